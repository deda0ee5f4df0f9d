"""An axis of a chart: from values to places, linear or logarithmic, with round ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_TICKS = 6


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`; `ticks` are the values that are written beside it."""

    title: str
    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    @classmethod
    def linear(cls, title: str, values: Iterable[float]) -> Axis:
        """Return an axis from 0 to a round number over the largest value."""
        most = max((value for value in values if math.isfinite(value)), default=0.0) or 1.0
        step = _step(most)
        count = max(1, math.ceil(most / step - 1e-9))
        return cls(title, 0.0, count * step, tuple(i * step for i in range(count + 1)))

    @classmethod
    def powers(cls, title: str, values: Iterable[float]) -> Axis:
        """Return a logarithmic axis whose ticks are powers of two, as batch sizes are."""
        found = [value for value in values if value > 0] or [1.0]
        first, last = math.floor(math.log2(min(found))), math.ceil(math.log2(max(found)))
        every = 1 + (last - first) // 10
        # A little room on both sides, or the first and the last marker would stand on the frame.
        return cls(title, 2.0**first / 1.2, 2.0**last * 1.2, tuple(2.0**i for i in range(first, last + 1, every)), True)

    @classmethod
    def decades(cls, title: str, values: Iterable[float]) -> Axis:
        """Return a logarithmic axis whose ticks are 1, 2 and 5 times powers of ten; powers alone where those do."""
        found = [value for value in values if value > 0] or [1.0]
        low, high = min(found) / 1.15, max(found) * 1.15
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
            ticks = tuple(f * 10.0**e for e in exponents for f in factors if low <= f * 10.0**e <= high)
            if len(ticks) >= 3:
                break
        return cls(title, low, high, ticks, True)

    def at(self, value: float) -> float:
        """Return where a value lies, 0 at `low` and 1 at `high`; what lies outside is at the edge."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def _step(most: float) -> float:
    """Return the smallest round step that needs at most `_TICKS` of them."""
    power = 10.0 ** math.floor(math.log10(most / _TICKS))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10, 20) if most / (factor * power) <= _TICKS)
