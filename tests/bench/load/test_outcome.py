"""An outcome's figures: percentiles as numpy's, windows, what is counted and what is not, a growing backlog."""

from __future__ import annotations

import numpy as np
import pytest

from bench.load import Outcome, Plan
from tests.bench.load.conftest import PICTURES


def outcome(**changes: float) -> Outcome:
    """Return one whose measured time is 100 to 110."""
    made = Outcome(Plan("http://127.0.0.1:1/predictions/x", PICTURES, **(changes or {"clients": 4})))  # type: ignore[arg-type]
    made.begin, made.end, made.now = 100.0, 110.0, 111.0
    return made


def test_percentiles_are_numpys() -> None:
    made = outcome()
    latencies = np.random.default_rng(0).lognormal(3, 1, 777)
    for latency in latencies:
        made.add(101.0, 101.0 + latency / 1000, 200)
    found = made.summary()
    for name, percentile in (("p50_ms", 50), ("p95_ms", 95), ("p99_ms", 99), ("max_ms", 100)):
        assert found[name] == pytest.approx(np.percentile(latencies, percentile), abs=0.002)


def test_intervals_hold_the_percentile_they_are_of_as_often_as_they_say() -> None:
    source, held = np.random.default_rng(1), 0
    for _ in range(200):
        made = outcome()
        for latency in source.exponential(0.1, 400):
            made.add(101.0, 101.0 + latency, 200)
        low, high = made.summary()["intervals_ms"]["p95_ms"]
        held += low <= 100 * np.log(20) <= high
    assert 0.9 < held / 200 < 1
    few = outcome()
    few.add(101.0, 101.1, 200)
    assert few.summary()["intervals_ms"] == {"p50_ms": None, "p95_ms": None, "p99_ms": None}


def test_requests_count_by_their_start_and_rates_by_the_answers_end() -> None:
    made = outcome()
    for start, end in ((99.0, 99.5), (99.9, 100.1), (105.0, 106.0), (109.9, 112.0), (110.1, 112.0)):
        made.add(start, end, 200)
    found = made.summary()
    assert found["requests"] == 2  # begun in the measured time
    assert found["per_second"] == pytest.approx(2 / 10)  # answered in it
    assert found["max_ms"] == pytest.approx(2100)


def test_failures_are_all_that_is_not_200_and_only_200_have_a_latency() -> None:
    made = outcome()
    answers: tuple[int | str, ...] = (200, 429, 503, "Timeout")
    for end, answer in zip((101.1, 103.0, 104.0, 105.0), answers, strict=True):
        made.add(101.0, end, answer)
    found = made.summary()
    assert found["statuses"] == {"200": 1, "429": 1, "503": 1}
    assert found["errors"] == {"Timeout": 1}
    assert (found["requests"], found["failed"]) == (4, 3)
    assert found["per_second"] == pytest.approx(0.3)
    assert found["good_per_second"] == pytest.approx(0.1)
    assert found["max_ms"] == pytest.approx(100)
    assert "3 of 4 failed" in made.sentence()


def test_an_empty_one_has_no_percentiles() -> None:
    made = Outcome(Plan("http://127.0.0.1:1/", PICTURES, clients=1))
    found = made.summary()
    assert found["p50_ms"] is found["p95_ms"] is found["max_ms"] is found["backlog"] is None
    assert found["per_second"] == 0
    assert "0 of 0 failed" in made.sentence()


@pytest.mark.parametrize(
    ("name", "waiting", "growing"),
    [
        ("steady", lambda second: 20, False),
        ("a burst that is worked off", lambda second: 200 if 4 < second < 6 else 3, False),
        ("a tenth of 300 arrivals a second is left", lambda second: 10 + 30 * second, True),
        ("within chance of 300 arrivals a second", lambda second: 10 + 5 * second, False),
    ],
)
def test_a_backlog_grows_when_it_rises_by_more_than_chance(name: str, waiting: object, growing: bool) -> None:
    made = outcome(rate=300.0)
    assert callable(waiting)
    made.waiting = [(100 + tick / 10, int(waiting(tick / 10))) for tick in range(101)]
    backlog = made.summary()["backlog"]
    assert backlog["growing"] is growing, name
    assert backlog["at_end"] == made.waiting[-1][1]
    assert ("does not hold 300/s" in made.sentence()) is growing


def test_a_rate_that_is_held_only_with_failures_is_said() -> None:
    made = outcome(rate=300.0)
    made.waiting = [(100 + tick, 1) for tick in range(10)]
    made.add(101.0, 101.1, 429)
    assert made.sentence().endswith("the server does not hold 300/s without failures")
