"""The verdict: the same server twice is no difference, drift is no advantage, few rounds prove nothing."""

import random

import pytest

from bench.compare.verdict import FASTER, SAME, SLOWER, Verdict, coverage, judge, rank


def rounds(count: int, seed: int) -> list[float]:
    """Rates of a server on a machine whose speed wanders."""
    source = random.Random(seed)
    return [100 * source.lognormvariate(0, 0.1) for _ in range(count)]


def judged(rates: list[float], others: list[float]) -> Verdict:
    verdict = judge(rates, others)
    assert verdict is not None
    return verdict


def test_a_server_against_itself_is_no_difference() -> None:
    words = [judged(rounds(5, 2 * seed), rounds(5, 2 * seed + 1)).word for seed in range(400)]
    # All five on one side of 1: two of 32 chances, less what the margin takes.
    assert 1 - words.count(SAME) / 400 < 0.08
    # A difference within the margin is none.
    assert judged([101.0] * 9, [100.0] * 9).word == SAME


def test_a_server_that_wins_is_faster_also_on_a_machine_that_slows_down_or_has_one_wild_round() -> None:
    slow, fast = rounds(7, 1), [3 * rate for rate in rounds(7, 2)]
    assert (judged(fast, slow).word, judged(slow, fast).word) == (FASTER, SLOWER)
    drift = [100.0, 80.0, 60.0, 50.0, 40.0]
    assert judged([2 * rate for rate in drift], drift) == Verdict(2.0, 2.0, 2.0, FASTER)
    assert judged([200.0] * 8 + [1.0], [100.0] * 9).word == FASTER


@pytest.mark.parametrize("count", [1, 4])
def test_few_rounds_prove_nothing(count: int) -> None:
    verdict = judged([300.0] * count, [100.0] * count)
    assert (verdict.word, verdict.ratio) == (SAME, 3)


def test_rounds_without_both_are_left_out() -> None:
    assert judge([], [100.0]) is judge([100.0], [0.0]) is None
    assert judged([200.0, 200.0], [100.0, 100.0, 1.0]).ratio == 2


def test_the_interval_covers_as_often_as_it_says() -> None:
    # Order statistics of a median, from the binomial distribution.
    assert coverage(5, 1) == pytest.approx(0.9375)
    assert coverage(10, 2) == pytest.approx(0.978515625)
    assert [rank(count) for count in (1, 5, 7, 8, 10, 11, 20)] == [1, 1, 1, 2, 2, 3, 6]
