"""The line through the ladder, what it makes one expect, and the reasons why much is not measured."""

from __future__ import annotations

import math

import pytest

from bench.tune import candidates
from bench.tune.candidates import Field, layouts, neighbours, spread
from bench.tune.forecast import Curve, Forecaster
from bench.tune.goal import Goal
from bench.tune.settings import Settings
from bench.tune.standing import standings
from bench.tune.turns import Turn

SIZES = (1, 2, 4, 8, 16, 32)


def forecaster(goal: Goal, cores: int = 2, a_ms: float = 10.0, b_ms: float = 20.0) -> Forecaster:
    curves = {threads: Curve.through([(size, a_ms / threads * size + b_ms) for size in SIZES]) for threads in (1, 2)}
    return Forecaster(curves, goal, cores)


def reasons(field: Field) -> str:
    return "\n".join(f"{each.what}: {each.why}" for each in field.pruned)


def test_a_line_is_found_and_a_bend_is_followed() -> None:
    straight = Curve.through([(size, 5.0 * size + 7.0) for size in SIZES])
    assert (straight.line.a_ms, straight.line.b_ms) == (pytest.approx(5.0), pytest.approx(7.0))
    assert straight.milliseconds(64) == pytest.approx(327.0)
    bent = Curve.through([(size, size * (5.0 if size < 16 else 10.0)) for size in SIZES])
    assert bent.line.error > 0.12
    assert bent.milliseconds(8) == pytest.approx(40.0)
    assert bent.milliseconds(24) == pytest.approx(240.0)


def test_one_point_is_enough_for_a_line() -> None:
    assert Curve.through([(4, 40.0)]).milliseconds(8) == pytest.approx(80.0)


def test_clients_over_throughput_is_what_they_wait() -> None:
    found = forecaster(Goal(p95_ms=500, clients=48)).of(Settings(8, 1, 2, 1))
    assert found.per_second == pytest.approx(1000 * 8 / 100)
    assert found.p95_ms == pytest.approx(1.15 * 1000 * 48 / 80)
    # Two workers share two cores with the server itself.
    both = forecaster(Goal(p95_ms=500, clients=48)).of(Settings(8, 2, 2, 1))
    assert both.per_second == pytest.approx(2000 / (100 / 8 + 1))


def test_at_a_rate_beyond_the_capacity_ever_more_wait() -> None:
    assert math.isinf(forecaster(Goal(rate=200)).of(Settings(8, 1, 2, 1)).p95_ms)
    assert forecaster(Goal(rate=20)).of(Settings(8, 1, 2, 1)).p95_ms < 200


def test_what_was_measured_corrects_what_is_expected_nearby() -> None:
    goal = Goal(p95_ms=5000, clients=48)
    plain = forecaster(goal)
    slower = Turn(Settings(8, 2, 2, 1), 1, 5.0, plain.of(Settings(8, 2, 2, 1)).per_second / 2, 900.0, 0)
    learned = plain.learned(standings([slower], goal))
    for settings in (Settings(16, 2, 2, 1), Settings(16, 3, 2, 1)):
        assert learned.of(settings).per_second == pytest.approx(plain.of(settings).per_second / 2)
    assert learned.steps_from_measured(Settings(32, 2, 2, 1)) == 2
    assert learned.steps_from_measured(Settings(8, 2, 10, 1)) == 0


def test_threads_beyond_the_cores_and_workers_beyond_memory_are_out() -> None:
    kept, pruned = layouts(2, (1, 2), 48)
    assert kept == [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2)]
    assert [each.why for each in pruned] == ["6 threads would share 2 cores"] * 2
    kept, pruned = layouts(2, (1,), 1)
    assert kept == [(1, 1)]
    assert pruned[0].what == "2 workers of 1 thread, and more workers"
    assert pruned[0].why == "memory holds 1 worker"
    kept, pruned = layouts(16, (1,), 48)
    assert (4, 1) not in kept
    assert pruned[0].why == "1 threads leave most of 16 cores idle"


def test_batches_that_the_clients_cannot_fill_are_out() -> None:
    field = candidates.field(forecaster(Goal(p95_ms=5000, clients=20)), 48)
    assert max(each.batch_size for each in field.promising if each.workers == 2) == 12
    assert "batch 16, 24, 32, 48 and 64 with 2 workers of 1 thread: 20 clients are 10 for each worker" in reasons(field)


def test_delays_that_never_begin_are_out() -> None:
    field = candidates.field(forecaster(Goal(p95_ms=5000, clients=50)), 48)
    assert {each.max_batch_delay for each in field.promising if (each.batch_size, each.workers) == (8, 2)} == {2}
    assert {each.max_batch_delay for each in field.promising if (each.batch_size, each.workers) == (32, 2)} == {
        1,
        2,
        10,
        30,
    }
    assert "50 clients keep a whole batch waiting, so that no delay begins" in reasons(field)
    assert "a batch of 1 never waits" in reasons(field)


def test_forecasts_that_are_hopeless_are_out_with_their_figures() -> None:
    field = candidates.field(forecaster(Goal(p95_ms=700, clients=50)), 48)
    assert "batch 1, 1 worker, delay 2 ms, 1 thread each: expected 33 answers a second, so that 50 clients wait 1725 ms"
    assert "far over 700 ms" in reasons(field)
    field = candidates.field(forecaster(Goal(p95_ms=60_000, clients=50)), 48)
    assert "far under the best" in reasons(field)
    field = candidates.field(forecaster(Goal(rate=100)), 48)
    assert "fewer than arrive (100)" in reasons(field)


def test_a_budget_that_nothing_holds_leaves_something_to_measure() -> None:
    configured = Settings(3, 1, 7, 2)
    field = candidates.field(forecaster(Goal(p95_ms=1, clients=50)), 48, (configured,))
    assert len({(each.workers, each.threads) for each in field.promising}) >= 3
    assert configured in field.promising


@pytest.mark.parametrize("goal", [Goal(p95_ms=700), Goal(p95_ms=60_000), Goal(rate=50)])
def test_every_configuration_is_promising_or_has_a_reason(goal: Goal) -> None:
    field = candidates.field(forecaster(goal), 48)
    assert all(each.what and each.why for each in field.pruned)
    assert len(set(field.promising)) == len(field.promising)
    for layout in ((1, 1), (2, 1), (4, 1), (1, 2)):
        known = [each for each in field.promising if (each.workers, each.threads) == layout]
        layout_text = f"{layout[0]} worker"
        assert known or layout_text in reasons(field)


def test_the_first_ones_differ_most() -> None:
    field = candidates.field(forecaster(Goal(p95_ms=5000, clients=50)), 48)
    first = spread(field.promising, 2)[:6]
    assert len({(each.workers, each.threads) for each in first}) >= 3
    assert all(each.workers * each.threads <= 3 for each in first)
    assert {each.max_batch_delay for each in first} == {2}


def test_neighbours_are_one_step_away() -> None:
    field = candidates.field(forecaster(Goal(p95_ms=5000, clients=50)), 48)
    found = neighbours(Settings(32, 2, 2, 1), field.promising)
    assert found == [Settings(32, 2, 1, 1), Settings(32, 2, 10, 1)]
    assert Settings(8, 3, 2, 1) in neighbours(Settings(8, 2, 2, 1), field.promising)
