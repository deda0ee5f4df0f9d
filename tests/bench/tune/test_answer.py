"""The answer in one sentence, its table and its record, whatever was measured."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from bench.tune import candidates
from bench.tune.answer import Answer
from bench.tune.forecast import Curve, Forecaster
from bench.tune.goal import Goal
from bench.tune.settings import Settings
from bench.tune.turns import Turn

NOW, BETTER = Settings(8, 1, 2, 2), Settings(16, 2, 2, 1)
SIZES = (1, 2, 4, 8, 16, 32)


def answer(goal: Goal, turns: Sequence[tuple[Settings, float, float, int]], configured: Settings = NOW) -> Answer:
    curves = {threads: Curve.through([(size, 10.0 * size + 5) for size in SIZES]) for threads in (1, 2)}
    forecaster = Forecaster(curves, goal, 2)
    field = candidates.field(forecaster, 48, (configured,))
    made = [
        Turn(settings, number, 5.0, rate, p95, failed)
        for number in range(1, 4)
        for settings, rate, p95, failed in turns
    ]
    return Answer.of("colours", configured, forecaster, field, made)


@pytest.mark.parametrize(
    ("goal", "turns", "said"),
    [
        (
            Goal(p95_ms=500),
            [(BETTER, 183.4, 281.0, 0), (NOW, 92.0, 480.0, 0)],
            "colours: batch 16, 2 workers, delay 2 ms, 1 thread each: 183.4 requests a second, p95 281 ms, which holds "
            "p95 of at most 500 ms with 50 clients; 1.99 times what is configured now (batch 8, 1 worker, delay 2 ms, "
            "2 threads each: 92.0 a second, p95 480 ms).",
        ),
        (
            Goal(p95_ms=500),
            [(BETTER, 183.4, 281.0, 0), (NOW, 92.0, 580.0, 0)],
            "; what is configured now (batch 8, 1 worker, delay 2 ms, 2 threads each: 92.0 a second, p95 580 ms) does "
            "not hold it.",
        ),
        (Goal(p95_ms=500), [(NOW, 183.4, 281.0, 0)], "; it is what is configured now."),
        (
            Goal(p95_ms=500),
            [(BETTER, 92.0, 700.0, 0), (NOW, 80.0, 800.0, 0)],
            "colours: nothing measured holds p95 of at most 500 ms with 50 clients; the nearest is batch 16, "
            "2 workers, delay 2 ms, 1 thread each: 92.0 requests a second, p95 700 ms; about 35 clients at a time "
            "would be within the budget, or serve it from more cores.",
        ),
        (
            Goal(p95_ms=500),
            [(BETTER, 92.0, 300.0, 2)],
            "p95 300 ms, 6 requests failed or took over 10 s; look into why requests fail with `beeline bench load`.",
        ),
        (
            Goal(rate=60),
            [(BETTER, 60.0, 40.0, 0), (NOW, 60.0, 80.0, 0)],
            "which holds 60 arrivals a second; what is configured now (batch 8, 1 worker, delay 2 ms, 2 threads each: "
            "60.0 a second, p95 80 ms) has 2.00 times its p95.",
        ),
        (Goal(rate=60), [(BETTER, 40.0, 4000.0, 0)], "lower the rate, or serve it from more cores."),
        (
            Goal(p95_ms=500),
            [],
            "colours: no turn was measured; from the time of a batch alone, batch 32, 2 workers, delay 1 ms, 1 thread "
            "each is expected to answer 179 requests a second (p95 of at most 500 ms with 50 clients).",
        ),
    ],
)
def test_the_sentence(goal: Goal, turns: list[tuple[Settings, float, float, int]], said: str) -> None:
    found = answer(goal, turns).sentence
    assert said in found, found
    assert "\n" not in found


def test_the_record_has_what_a_report_needs_and_no_infinity() -> None:
    for goal in (Goal(p95_ms=500), Goal(rate=60), Goal(rate=6000)):
        for turns in ([(BETTER, 50.0, 300.0, 0)], []):
            result = answer(goal, turns).to_dict()
            json.dumps(result, allow_nan=False)
            assert set(result["fit"]) >= {"a_ms", "b_ms", "error"}
            assert all(each["what"] and each["why"] for each in result["pruned"])
            assert Settings.of(result["best"])
            assert len(result["tried"]) == len(turns)


def test_the_table_marks_what_is_chosen_and_says_why_the_rest_is_not_there() -> None:
    lines = answer(Goal(p95_ms=500), [(BETTER, 183.4, 281.0, 0), (NOW, 92.0, 580.0, 0)]).lines()
    assert lines[0].split() == ["requests/s", "p95", "ms", "failed", "batch", "seen", "turns", "goal", "configuration"]
    assert lines[1].endswith("holds  batch 16, 2 workers, delay 2 ms, 1 thread each <- chosen")
    assert lines[2].endswith("<- configured now")
    assert "not measured:" in lines
    assert any("threads would share 2 cores" in line for line in lines)


def test_what_was_promising_and_not_measured_has_its_forecast() -> None:
    found = answer(Goal(p95_ms=5000), [(BETTER, 100.0, 500.0, 0)])
    reasons = {each.what: each.why for each in found.pruned}
    assert "nothing near it was in the lead" in reasons[str(Settings(8, 2, 2, 1))]
    assert str(BETTER) not in reasons
