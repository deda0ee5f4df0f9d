"""The search on a fake server: near the best in noise, within its time, usable whenever it is interrupted."""

from __future__ import annotations

import pytest

from bench.tune import rank, turns_of
from bench.tune.grid import Goal, Settings, Turn
from tests.bench.tune.conftest import CONFIGURED, Machine, MakeTrial, Trial, every


def chosen(trial: Trial) -> tuple[float, float]:
    """Return the true figures of what the turns so far say is best."""
    best = rank(turns_of(trial.journal), trial.goal, CONFIGURED)[0]
    return trial.machine.truth(best.settings, trial.goal)[:2]


def best_of_all(machine: Machine, goal: Goal) -> float:
    """Return the throughput (at a rate: the 95th percentile) of the best of an exhaustive, noiseless search."""
    found = [machine.truth(settings, goal) for settings in every(machine)]
    if goal.p95_ms is None:
        return min(p95 for _, p95, growing in found if not growing)
    return max(rate for rate, p95, _ in found if p95 <= goal.p95_ms)


BUDGET = Goal(p95_ms=5000)


@pytest.mark.parametrize(
    ("goal", "machine", "options", "third", "least"),
    [
        (BUDGET, Machine(a_ms=5.0, b_ms=4.0), {}, 0.95, 0.92),
        (BUDGET, Machine(), {}, 0.95, 0.92),
        (BUDGET, Machine(a_ms=80.0, b_ms=20.0, crowd=0.05), {}, 0.95, 0.92),
        # Best in threads, in small batches, and with many workers that wait for their pipes.
        (BUDGET, Machine(a_ms=20.0, b_ms=6.0, gain=2.0, crowd=0.3), {}, 0.95, 0.92),
        (BUDGET, Machine(a_ms=20.0, b_ms=2.0, large=0.5), {}, 0.95, 0.92),
        (BUDGET, Machine(a_ms=6.0, b_ms=2.0, pauses=40.0, crowd=0.0), {}, 0.95, 0.92),
        # Clients that just fill the workers, which the delay lets them.
        (Goal(p95_ms=5000, clients=16), Machine(a_ms=10.0, b_ms=120.0), {"seconds": 99.0, "start": 3.0}, 0.95, 0.9),
        (BUDGET, Machine(), {"noise": 0.06, "drift": 0.12}, 0.9, 0.8),
        (BUDGET, Machine(), {"most_workers": 3}, 0.8, 0.8),
        (Goal(rate=25), Machine(), {}, 0.87, 0.87),
    ],
)
def test_the_choice_is_near_the_best_of_all(
    make_trial: MakeTrial, goal: Goal, machine: Machine, options: dict[str, float], third: float, least: float
) -> None:
    shares = []
    for seed in range(12):
        trial = make_trial(goal, machine, seed=seed, **options)
        trial.run()
        assert trial.server.now <= trial.seconds
        rate, p95 = chosen(trial)
        best = best_of_all(machine, goal)
        shares.append(best / p95 if goal.rate else rate / best)
    # Noise may lead two of a dozen astray, and not far.
    assert sorted(shares)[2] >= third, shares
    assert min(shares) >= least, shares


def test_a_budget_that_nothing_holds_leaves_the_nearest(make_trial: MakeTrial) -> None:
    trial = make_trial(Goal(p95_ms=50))
    trial.run()
    assert not trial.goal.holds(rank(turns_of(trial.journal), trial.goal)[0])
    fastest = max(trial.machine.truth(settings, trial.goal)[0] for settings in every(trial.machine))
    assert chosen(trial)[0] >= 0.9 * fastest


def test_finalists_are_halved_in_turns_with_what_is_configured(make_trial: MakeTrial) -> None:
    trial = make_trial(BUDGET)
    trial.run()
    counts = sorted(trial.server.runs.count(settings) for settings in set(trial.server.runs))
    # One turn each for most, more for the finalists.
    assert counts[len(counts) // 2] <= 2 < counts[-1]
    assert trial.server.runs.count(CONFIGURED) >= 2
    assert len(set(trial.server.runs[-4:])) <= 3


@pytest.mark.parametrize("second", [30, 41, 75, 123, 150, 199])
def test_an_interruption_at_any_point_leaves_an_answer_and_resumes(make_trial: MakeTrial, second: int) -> None:
    trial = make_trial(BUDGET, interrupt_at=second)
    with pytest.raises(KeyboardInterrupt):
        trial.run()
    measured = turns_of(trial.journal)
    if measured:
        best = max(trial.machine.truth(turn.settings, trial.goal)[0] for turn in measured)
        assert chosen(trial)[0] >= 0.85 * best
    went_on = trial.again()
    went_on.run()
    assert turns_of(went_on.journal)[: len(measured)] == measured
    # Exploring goes on with what was not measured, apart from the best so far and the finalists.
    again = {turn.settings for turn in measured} & set(went_on.server.runs)
    assert len(again) <= 8
    assert chosen(went_on)[0] >= 0.93 * best_of_all(trial.machine, trial.goal)


def test_little_time_is_enough_for_some_answer(make_trial: MakeTrial) -> None:
    trial = make_trial(BUDGET, seconds=20)
    trial.run()
    assert turns_of(trial.journal)
    assert trial.server.now <= 22


FAST, SLOW, OTHER = Settings(16, 2, 2, 1), Settings(8, 2, 2, 1), Settings(4, 1, 2, 2)
TIGHT = Goal(p95_ms=500)


def turn(settings: Settings, per_second: float, p95_ms: float | None = 100.0, failed: int = 0) -> Turn:
    return Turn(settings, 5.0, per_second, p95_ms, failed, TIGHT.cost(per_second, p95_ms))


def at_rate(settings: Settings, per_second: float, p95_ms: float, growing: bool = False) -> Turn:
    return Turn(settings, 5.0, per_second, p95_ms, 0, p95_ms, growing)


BEHIND = at_rate(OTHER, 60, 3000, growing=True)


def test_several_turns_count_by_the_median_of_each_figure() -> None:
    turns = [turn(FAST, rate, p95) for rate, p95 in ((100, 400), (90, 700), (95, 450))]
    (whole,) = rank(turns, TIGHT)
    assert (whole.per_second, whole.p95_ms, whole.turns) == (95, 450, 3)
    assert TIGHT.holds(whole)


@pytest.mark.parametrize(
    ("goal", "turns", "order", "holding"),
    [
        # The most throughput within the budget.
        (TIGHT, [turn(FAST, 100, 600), turn(SLOW, 80, 400), turn(OTHER, 70, 300)], [SLOW, OTHER, FAST], 2),
        # A single failed request does not hold.
        (TIGHT, [turn(FAST, 100, failed=1), turn(SLOW, 80)], [SLOW, FAST], 1),
        # Where nothing holds, the nearest.
        (TIGHT, [turn(FAST, 100, 900), turn(SLOW, 80, 700), turn(OTHER, 1, None)], [SLOW, FAST, OTHER], 0),
        # At a rate, the lowest latency of what keeps up.
        (Goal(rate=100), [at_rate(FAST, 99, 80), at_rate(SLOW, 99, 60), BEHIND], [SLOW, FAST, OTHER], 2),
    ],
)
def test_the_best_comes_first(goal: Goal, turns: list[Turn], order: list[Settings], holding: int) -> None:
    ranked = rank(turns, goal)
    assert [each.settings for each in ranked] == order
    assert sum(map(goal.holds, ranked)) == holding
    assert rank([], goal) == []


def test_a_machine_that_slows_down_does_not_change_the_ranking() -> None:
    # The machine halves its speed between the two halves; FAST is measured in both.
    before = [turn(FAST, 100), turn(OTHER, 60)] * 4
    after = [turn(FAST, 50), turn(SLOW, 45)] * 4
    ranked = rank(before + after, TIGHT)
    assert [each.settings for each in ranked] == [FAST, SLOW, OTHER]
    assert ranked[1].cost / ranked[0].cost == pytest.approx(1.11, abs=0.09)


def test_among_equals_the_configured_one_wins_else_the_lower_latency() -> None:
    turns = [turn(FAST, 100.3, 300), turn(SLOW, 100, 200), turn(OTHER, 80)] * 3
    for configured, order in ((FAST, [FAST, SLOW, OTHER]), (OTHER, [SLOW, FAST, OTHER])):
        assert [each.settings for each in rank(turns, TIGHT, configured)] == order
