"""What the time of a batch makes one expect, and the reasons why much is not measured."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from beeline.errors import ConfigError
from bench.sweep import Fit
from bench.tune.grid import Forecast, Goal, Settings, candidates

NOW = Settings(3, 1, 7, 2)


def forecast(goal: Goal, cores: int = 2) -> Forecast:
    return Forecast({threads: Fit(10.0 / threads, 20.0, 0.0) for threads in (1, 2)}, goal, cores)


def test_clients_over_throughput_is_what_they_wait() -> None:
    per_second, p95_ms = forecast(Goal(p95_ms=500, clients=48)).of(Settings(8, 1, 2, 1))
    assert per_second == pytest.approx(1000 * 8 / 100)
    assert p95_ms == pytest.approx(1.15 * 1000 * 48 / 80)
    # Two workers share two cores with the server itself.
    assert forecast(Goal(p95_ms=500, clients=48)).of(Settings(8, 2, 2, 1))[0] == pytest.approx(2000 / (100 / 8 + 1))


def test_at_a_rate_beyond_the_capacity_ever_more_wait() -> None:
    assert math.isinf(forecast(Goal(rate=200)).of(Settings(8, 1, 2, 1))[1])
    assert "ever more waiting" in forecast(Goal(rate=200)).text(Settings(8, 1, 2, 1))
    quick, slow = (forecast(Goal(rate=20)).of(Settings(8, 1, delay, 1))[1] for delay in (2, 30))
    assert quick + 28 == pytest.approx(slow)
    assert slow < 200


def test_what_was_measured_corrects_what_is_expected_of_the_layout_and_those_like_it() -> None:
    plain = forecast(Goal(p95_ms=5000, clients=48))
    speed = math.log(plain.of(Settings(8, 2, 2, 1))[0] / 2)
    learned = plain.learned([(Settings(8, 2, 2, 1), speed, math.log(900.0))])
    for settings in (Settings(16, 2, 2, 1), Settings(16, 3, 2, 1)):
        assert learned.of(settings)[0] == pytest.approx(plain.of(settings)[0] / 2)


@pytest.mark.parametrize(
    ("goal", "cores", "room", "what", "why"),
    [
        (Goal(p95_ms=700), 2, 48, "6 workers of 1 thread, and more workers", "6 threads would share 2 cores"),
        (Goal(p95_ms=700), 2, 1, "2 workers of 1 thread, and more workers", "memory holds 1 workers"),
        (Goal(p95_ms=700), 16, 48, "4 workers of 1 thread", "4 threads would leave most of 16 cores idle"),
        (
            Goal(p95_ms=5000, clients=20),
            2,
            48,
            "batch over 12 with 2 workers of 1 thread",
            "20 clients are 10 for each",
        ),
        (
            Goal(p95_ms=5000),
            2,
            48,
            "batch 2 to 16 with 2 workers of 1 thread and other delays",
            "so that no delay begins",
        ),
        (Goal(p95_ms=5000), 2, 48, "batch 1 with other delays", "a batch of 1 never waits"),
        (Goal(p95_ms=40), 2, 48, "delay 30 ms", "it would take half of the 40 ms alone"),
        (
            Goal(p95_ms=700),
            2,
            48,
            "batch 1, 1 worker, delay 2 ms, 1 thread each",
            "expected 33 answers a second, p95 1725",
        ),
        (
            Goal(rate=100),
            2,
            48,
            "batch 1, 1 worker, delay 2 ms, 1 thread each",
            "33 answers a second, ever more waiting",
        ),
    ],
)
def test_what_cannot_be_best_is_out_with_its_reason(goal: Goal, cores: int, room: int, what: str, why: str) -> None:
    promising, pruned = candidates(forecast(goal, cores), room, NOW)
    assert why in pruned[what], pruned
    assert NOW in promising
    assert not set(map(str, promising)) & set(pruned)


def test_delays_are_tried_where_the_clients_leave_room_for_them() -> None:
    promising, _ = candidates(forecast(Goal(p95_ms=5000, clients=50)), 48, NOW)
    delays = {size: {each.max_batch_delay for each in promising if each.batch_size == size} for size in (8, 32)}
    assert delays == {8: {2}, 32: {2, 10, 30}}
    at_a_rate, _ = candidates(forecast(Goal(rate=20)), 48, NOW)
    assert {each.max_batch_delay for each in at_a_rate} >= {1, 2, 10}


def test_a_budget_that_nothing_holds_leaves_something_to_measure() -> None:
    promising, _ = candidates(forecast(Goal(p95_ms=1, clients=50)), 48, NOW)
    assert len(set(promising)) == len(promising) >= 4


@pytest.mark.parametrize(("text", "value"), [("500ms", 500), ("0.5s", 500), ("500", 500), (" 1.5 S ", 1500)])
def test_a_budget_has_a_unit(text: str, value: float) -> None:
    assert Goal.parse(text, None, 50) == Goal(p95_ms=value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Goal.parse("soon", None, 50), "--p95 is 'soon'; give milliseconds or seconds"),
        (lambda: Goal(), "tune needs a goal"),
        (lambda: Goal(p95_ms=5, rate=5), "tune needs a goal"),
        (lambda: Goal(p95_ms=-5), "--p95 is -5; give more than 0"),
        (lambda: Goal(rate=5, clients=0), "--clients is 0; give more than 0"),
    ],
)
def test_an_impossible_goal_is_one_sentence(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value)
