"""The interval of the ratio of container and bare server."""

from __future__ import annotations

import math
from itertools import product

import pytest

from bench.studies import interval


@pytest.mark.parametrize(("count", "cut"), [(6, 0), (7, 0), (8, 0), (9, 1), (12, 2), (20, 5)])
def test_the_interval_is_by_rank(count: int, cut: int) -> None:
    ratios = [float(number) for number in range(count)]
    assert interval(ratios) == (cut, count - 1 - cut)


def test_of_few_turns_nothing_can_be_said() -> None:
    assert interval([1.0] * 5) == (-math.inf, math.inf)


def test_it_holds_the_median_as_often_as_it_says() -> None:
    """Every way in which nine draws can lie below and above the median."""
    held = 0
    for signs in product((-1.0, 1.0), repeat=9):
        low, high = interval(sorted(signs))
        held += low < 0 < high
    assert held / 2**9 >= 0.95
