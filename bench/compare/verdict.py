"""Whether one server is faster than another: ratios round by round, an interval, and a word; and the table of that."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FASTER, SLOWER, SAME = "faster", "slower", "no difference"
# The interval holds the median of such ratios at least this often; five rounds are the fewest with which it can.
COVERAGE = 0.9
FEWEST = 5
# Differences below this are nobody's reason to choose a server, and a shared machine makes them by itself.
MARGIN = 0.02
_COLUMNS = (
    "server", "req/s", "p95 ms", "against", "verdict", "threads", "precision", "batch", "workers", "agree", "MB",
    "ready", "failed",
)  # fmt: skip


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


def lines(result: Mapping[str, Any]) -> list[str]:
    """Return a comparison's rows as a table a class, and what the same server entered twice came to."""
    out: list[str] = []
    for name in dict.fromkeys(row["class"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["class"] == name]
        cells = [_COLUMNS, *(_cells(row) for row in rows if row["per_second"])]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        out.append(f"{name}:")
        for line in cells:
            out.append("  " + "  ".join(map(str.ljust, line, widths)).rstrip())
        out += [f"  {row['server']}: {row['error']}" for row in rows if row["error"]]
    again = result["aa"]
    if again["verdict"]:
        low, high = again["interval"]
        verdict = f"{again['verdict']}, {again['ratio']:.2f} of itself ({low:.2f} to {high:.2f})"
        out.append(f"the same server twice ({again['server']}): {verdict}")
    return out


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    p95 = [value for value in row["p95_ms"] if value is not None]
    low, high = row["interval"] or (0, 0)
    return (
        str(row["server"]),
        f"{statistics.median(row['per_second']):.1f}",
        f"{statistics.median(p95):.0f}" if p95 else "-",
        f"{row['ratio']:.2f} ({low:.2f}-{high:.2f})" if row["ratio"] else "-",
        str(row["verdict"] or "-"),
        str(row["threads"] or "default"),
        str(row["precision"]),
        str(row["batch"]),
        str(row["workers"]),
        f"{row['agreement']:.3f}" if row["agreement"] is not None else "-",
        f"{row['memory_mb']:.0f}",
        f"{row['ready_s']:.1f} s",
        str(row["failed"]),
    )
