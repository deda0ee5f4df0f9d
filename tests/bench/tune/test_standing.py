"""Who is best: within the goal, without failures, the machine's drift taken out."""

from __future__ import annotations

import pytest

from beeline.errors import ConfigError
from bench.tune.goal import Goal, milliseconds
from bench.tune.settings import Settings
from bench.tune.standing import choose, standings
from bench.tune.turns import Turn

FAST, SLOW, OTHER = Settings(16, 2, 2, 1), Settings(8, 2, 2, 1), Settings(4, 1, 2, 2)
BUDGET = Goal(p95_ms=500)


def turn(
    settings: Settings, per_second: float, p95_ms: float | None = 100.0, failed: int = 0, growing: bool = False
) -> Turn:
    return Turn(settings, 1, 5.0, per_second, p95_ms, failed, growing)


def test_the_most_throughput_within_the_budget_wins() -> None:
    ranked = standings([turn(FAST, 100, 600), turn(SLOW, 80, 400), turn(OTHER, 70, 300)], BUDGET)
    assert [each.settings for each in ranked] == [SLOW, OTHER, FAST]
    assert [each.holds for each in ranked] == [True, True, False]


def test_a_single_failed_request_does_not_hold() -> None:
    ranked = standings([turn(FAST, 100, failed=1), turn(SLOW, 80)], BUDGET)
    assert ranked[0].settings == SLOW
    assert not ranked[1].holds


def test_where_nothing_holds_the_nearest_comes_first() -> None:
    ranked = standings([turn(FAST, 100, 900), turn(SLOW, 80, 700), turn(OTHER, 1, None)], BUDGET)
    assert [each.settings for each in ranked] == [SLOW, FAST, OTHER]
    assert ranked[2].p95_ms is None


def test_at_a_rate_the_lowest_latency_that_keeps_up_wins() -> None:
    goal = Goal(rate=100)
    turns = [turn(FAST, 99, 80), turn(SLOW, 99, 60), turn(OTHER, 60, 3000, growing=True)]
    ranked = standings(turns, goal)
    assert [each.settings for each in ranked] == [SLOW, FAST, OTHER]
    assert not ranked[2].holds


def test_a_machine_that_slows_down_is_no_verdict_on_who_is_measured_then() -> None:
    # The machine halves its speed between the two halves; FAST is measured in both.
    before = [turn(FAST, 100), turn(OTHER, 60)] * 4
    after = [turn(FAST, 50), turn(SLOW, 45)] * 4
    ranked = standings(before + after, BUDGET)
    assert [each.settings for each in ranked] == [FAST, SLOW, OTHER]
    assert ranked[0].speed - ranked[1].speed == pytest.approx(0.105, abs=0.08)


def test_more_turns_are_surer() -> None:
    few = standings([turn(FAST, 100), turn(SLOW, 90)], BUDGET)
    many = standings([turn(FAST, 100), turn(SLOW, 90)] * 6, BUDGET)
    assert max(each.error for each in many) < max(each.error for each in few)


def test_of_equals_what_is_configured_stays() -> None:
    ranked = standings([turn(FAST, 100.3), turn(SLOW, 100), turn(OTHER, 80)] * 3, BUDGET)
    chosen = choose(ranked, BUDGET, SLOW)
    assert chosen is not None
    assert chosen.settings == SLOW
    assert choose([], BUDGET) is None


def test_of_equals_the_quicker_answer_wins() -> None:
    ranked = standings([turn(FAST, 100.3, 300), turn(SLOW, 100, 200)] * 3, BUDGET)
    chosen = choose(ranked, BUDGET)
    assert chosen is not None
    assert chosen.settings == SLOW


@pytest.mark.parametrize(("text", "value"), [("500ms", 500), ("0.5s", 500), ("500", 500), (" 1.5 S ", 1500)])
def test_a_budget_has_a_unit(text: str, value: float) -> None:
    assert milliseconds(text) == value


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: milliseconds("soon"), "--p95 is 'soon'; give milliseconds or seconds"),
        (lambda: Goal(), "tune needs a goal"),
        (lambda: Goal(p95_ms=5, rate=5), "tune needs a goal"),
        (lambda: Goal(p95_ms=-5), "--p95 is -5; give more than 0"),
        (lambda: Goal(rate=5, clients=0), "--clients is 0; give more than 0"),
    ],
)
def test_an_impossible_goal_is_one_sentence(make: object, said: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError) as caught:
        make()
    assert said in str(caught.value)
