"""Whether one server is faster than another: ratios round by round, an interval, and a word."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

FASTER, SLOWER, SAME = "faster", "slower", "no difference"
# The interval holds the median of such ratios at least this often; five rounds are the fewest with which it can.
COVERAGE = 0.9
FEWEST = 5
# Differences below this are nobody's reason to choose a server, and a shared machine makes them by itself.
MARGIN = 0.02


@dataclass(frozen=True)
class Verdict:
    """The median of the ratios to the other server, its interval, and what that says."""

    ratio: float
    low: float
    high: float
    word: str


def judge(rates: Sequence[float], others: Sequence[float]) -> Verdict | None:
    """Compare two servers that were measured in the same rounds.

    A machine's speed drifts from round to round, so each round gives one ratio. Their median's interval is
    taken from their order alone (no distribution is assumed). A server is faster or slower only where the whole
    interval lies more than `MARGIN` off 1; with fewer than `FEWEST` rounds nothing can be told.

    Args:
        rates: requests a second, one a round.
        others: of the server it is compared with, in the same order.

    Returns:
        None where there is no round with both.
    """
    ratios = sorted(rate / other for rate, other in zip(rates, others, strict=False) if other > 0)
    if not ratios:
        return None
    place = rank(len(ratios))
    low, high, word = ratios[place - 1], ratios[-place], SAME
    if len(ratios) >= FEWEST and (low > 1 + MARGIN or high < 1 - MARGIN):
        word = FASTER if low > 1 else SLOWER
    return Verdict(statistics.median(ratios), low, high, word)


def rank(count: int) -> int:
    """Return which of `count` ordered values, from either end, bound the median's interval: 1 is the outermost."""
    places = [place for place in range(1, count // 2 + 1) if coverage(count, place) >= COVERAGE]
    return max(places, default=1)


def coverage(count: int, place: int) -> float:
    """Return how often the median lies between the `place`-th values from both ends of `count`."""
    return float(1 - 2 * sum(math.comb(count, k) for k in range(place)) / 2**count)
