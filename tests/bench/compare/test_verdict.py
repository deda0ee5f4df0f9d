"""The verdict: the same server twice is no difference, drift is no advantage, few rounds prove nothing."""

import random

import pytest

from bench.compare.verdict import FASTER, SAME, SLOWER, coverage, judge, rank


def rounds(count: int, seed: int, mean: float = 100.0, noise: float = 0.1) -> list[float]:
    """Rates of a server on a machine whose speed wanders."""
    source = random.Random(seed)
    return [mean * source.lognormvariate(0, noise) for _ in range(count)]


def test_a_server_against_itself_is_no_difference() -> None:
    wrong = 0
    for seed in range(400):
        found = judge(rounds(5, 2 * seed), rounds(5, 2 * seed + 1))
        assert found is not None
        wrong += found.word != SAME
    # All five on one side of 1: two of 32 chances, less what the margin takes.
    assert wrong / 400 < 0.08


def test_a_machine_that_slows_down_takes_both_servers_with_it() -> None:
    drift = [100.0, 80.0, 60.0, 50.0, 40.0]
    found = judge([2 * rate for rate in drift], drift)
    assert found is not None
    assert (found.ratio, found.low, found.high, found.word) == (2.0, 2.0, 2.0, FASTER)


def test_a_server_that_wins_is_faster_and_one_that_loses_slower() -> None:
    slow, fast = rounds(7, 1), [3 * rate for rate in rounds(7, 2)]
    faster, slower = judge(fast, slow), judge(slow, fast)
    assert faster is not None
    assert slower is not None
    assert faster.word == FASTER
    assert slower.word == SLOWER


def test_a_difference_within_the_margin_is_none() -> None:
    found = judge([101.0] * 9, [100.0] * 9)
    assert found is not None
    assert found.word == SAME


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_few_rounds_prove_nothing(count: int) -> None:
    found = judge([300.0] * count, [100.0] * count)
    assert found is not None
    assert found.word == SAME
    assert found.ratio == 3


def test_no_round_with_both_gives_no_verdict() -> None:
    assert judge([], [100.0]) is None
    assert judge([100.0], [0.0]) is None


def test_rounds_that_a_server_lost_are_left_out() -> None:
    found = judge([200.0, 200.0], [100.0, 100.0, 1.0])
    assert found is not None
    assert found.ratio == 2


def test_the_interval_covers_as_often_as_it_says() -> None:
    # Order statistics of a median, from the binomial distribution.
    assert coverage(5, 1) == pytest.approx(0.9375)
    assert coverage(10, 2) == pytest.approx(0.978515625)
    assert [rank(count) for count in (1, 5, 7, 8, 10, 11, 20)] == [1, 1, 1, 2, 2, 3, 6]


def test_one_wild_round_of_many_changes_nothing() -> None:
    found = judge([200.0] * 8 + [1.0], [100.0] * 9)
    assert found is not None
    assert found.word == FASTER
