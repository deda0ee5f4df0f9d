"""What the time of a batch makes one expect, and the reasons why much is not measured."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from beeline.errors import ConfigError
from bench.sweep import Fit
from bench.tune.grid import Forecast, Goal, Settings, Turn, candidates, delays

NOW, SMALLEST = Settings(3, 1, 7, 2), Settings(1, 1, 2, 1)


def forecast(goal: Goal, cores: int = 2) -> Forecast:
    return Forecast({threads: Fit(10.0 / threads, 20.0, 0.0) for threads in (1, 2)}, goal, cores)


def test_an_answer_takes_clients_over_throughput() -> None:
    assert forecast(Goal(p95_ms=500, clients=48)).of(Settings(8, 1, 2, 1)) == pytest.approx(48 * 100 / 8)
    # Two workers share two cores with the server itself.
    two = forecast(Goal(p95_ms=500, clients=48)).of(Settings(8, 2, 2, 1))
    assert two == pytest.approx(48 * (100 / 8 + 1) / 2)


def test_a_rate_over_the_capacity_makes_an_endless_queue() -> None:
    small, large = (forecast(Goal(rate=200)).of(Settings(size, 1, 2, 1)) for size in (4, 8))
    assert small > large > 600_000
    assert "longer and longer waits" in forecast(Goal(rate=200)).text(Settings(8, 1, 2, 1))
    quick, slow = (forecast(Goal(rate=20)).of(Settings(8, 1, delay, 1)) for delay in (2, 30))
    assert quick + 28 == pytest.approx(slow)
    assert slow < 200


def test_a_measurement_corrects_the_forecast_of_its_layout_and_of_similar_ones() -> None:
    plain = forecast(Goal(p95_ms=5000, clients=48))
    turn = Turn(Settings(8, 2, 2, 1), 4.0, 80.0, 900.0, 0, 2 * plain.of(Settings(8, 2, 2, 1)))
    for settings in (Settings(16, 2, 2, 1), Settings(16, 3, 2, 1)):
        assert plain.learned([turn]).of(settings) == pytest.approx(2 * plain.of(settings))


@pytest.mark.parametrize(
    ("goal", "cores", "room", "what", "why"),
    [
        (Goal(p95_ms=700), 2, 48, "other workers than 1 to 4 of threads 1", "fewer leave 2 cores idle, more crowd"),
        (Goal(p95_ms=700), 2, 1, "other workers than 1 to 1 of threads 1", "and memory holds 1"),
        (Goal(p95_ms=700), 16, 48, "other workers than 5 to 32 of threads 1", "fewer leave 16 cores idle"),
        (Goal(p95_ms=5000, clients=20), 2, 48, "batch sizes over 12 of workers 2", "20 clients never fill one"),
        (Goal(p95_ms=700), 2, 48, str(SMALLEST), "1500 ms an answer are expected"),
        (Goal(rate=100), 2, 48, str(SMALLEST), "longer and longer waits are expected"),
    ],
)
def test_what_cannot_be_best_is_pruned_with_a_reason(goal: Goal, cores: int, room: int, what: str, why: str) -> None:
    promising, pruned = candidates(forecast(goal, cores), room, NOW)
    assert why in pruned[what], pruned
    assert NOW in promising
    assert len(set(promising)) == len(promising) > 1
    assert not set(map(str, promising)) & set(pruned)


@pytest.mark.parametrize(
    ("settings", "goal", "tried"),
    [
        (Settings(32, 2, 2, 1), Goal(p95_ms=5000), {2, 10, 30}),
        # Half of the budget; a whole batch waits already; a batch of 1.
        (Settings(32, 2, 2, 1), Goal(p95_ms=60), {2, 10}),
        (Settings(8, 2, 2, 1), Goal(p95_ms=5000), set()),
        (Settings(1, 2, 2, 1), Goal(rate=20), set()),
        (Settings(8, 2, 2, 1), Goal(rate=20), {2, 10, 30}),
    ],
)
def test_delays_are_tried_where_they_make_a_difference(settings: Settings, goal: Goal, tried: set[int]) -> None:
    assert {each.max_batch_delay for each in delays(settings, goal)} == tried


@pytest.mark.parametrize(("text", "value"), [("500ms", 500), ("0.5s", 500), ("500", 500), (" 1.5 S ", 1500)])
def test_a_budget_has_a_unit(text: str, value: float) -> None:
    assert Goal.parse(text, None, 50) == Goal(p95_ms=value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Goal.parse("soon", None, 50), "--p95 is 'soon'; give milliseconds or seconds"),
        (lambda: Goal.parse("-5ms", None, 50), "--p95 is '-5ms'; give milliseconds or seconds"),
        (lambda: Goal.parse("0", None, 50), "--p95 is '0'; give milliseconds or seconds"),
        (lambda: Goal.parse("1s", 5, 50), "tune needs a goal"),
        (lambda: Goal(), "tune needs a goal"),
    ],
)
def test_an_impossible_goal_is_one_sentence(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value)
