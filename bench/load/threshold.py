"""A limit that must not be crossed, as `p95>500ms`, and whether a load's figures keep it."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import Any

from beeline.errors import ConfigError, did_you_mean

_TIME, _RATE, _COUNT, _SHARE = ("ms", "s"), ("", "/s"), ("",), ("", "%")
# Each quantity's key in a summary, and the units that it may be given in.
QUANTITIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "p50": ("p50_ms", _TIME),
    "p95": ("p95_ms", _TIME),
    "p99": ("p99_ms", _TIME),
    "max": ("max_ms", _TIME),
    "rps": ("per_second", _RATE),
    "good": ("good_per_second", _RATE),
    "errors": ("failed", _SHARE),
    "backlog": ("backlog", _COUNT),
}
_COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_FORM = re.compile(r"\s*(\w+)\s*(>=|<=|>|<)\s*(\d+(?:\.\d*)?|\.\d+)\s*(ms|s|%|/s|)\s*")


@dataclass(frozen=True)
class Verdict:
    """A threshold's text, the value found in its unit (None where there is none), and whether it holds."""

    text: str
    value: float | None
    holds: bool


@dataclass(frozen=True)
class Threshold:
    """A load has failed if `quantity` compares like this with `limit`, in `unit`."""

    text: str
    quantity: str
    comparison: str
    limit: float
    unit: str

    @property
    def of_client(self) -> bool:
        """Whether a slow client crosses it as well as a slow server; only errors are the server's in any case."""
        return self.quantity != "errors"

    def judge(self, summary: dict[str, Any]) -> Verdict:
        """Return whether a load's summary keeps it; what was not measured is not kept."""
        value = self._value(summary)
        holds = value is not None and not _COMPARISONS[self.comparison](value, self.limit)
        return Verdict(self.text, value, holds)

    def _value(self, summary: dict[str, Any]) -> float | None:
        value = summary[QUANTITIES[self.quantity][0]]
        if self.quantity == "backlog":
            value = None if value is None else value["at_end"]
        if value is None:
            return None
        if self.unit == "%":
            return round(100 * value / summary["requests"], 3) if summary["requests"] else None
        return float(value) / (1000 if self.unit == "s" else 1)


def parse(text: str) -> Threshold:
    """Read `p95>500ms`, `errors>0`, `errors>1%`, `rps<300`, `p99>=1s`.

    Raises:
        ConfigError: naming what is not understood.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise ConfigError(f"--fail-if is {text!r}; give a quantity, one of < <= > >=, and a number, as in 'p95>500ms'")
    quantity, comparison, limit, unit = found.groups()
    if quantity not in QUANTITIES:
        raise ConfigError(f"--fail-if {text!r} has the quantity {quantity!r}{did_you_mean(quantity, QUANTITIES)}")
    units = QUANTITIES[quantity][1]
    if unit not in units:
        wanted = " or ".join(f"'{quantity}{comparison}{limit}{each}'" for each in units)
        raise ConfigError(f"--fail-if {text!r} has the unit {unit!r}; write {wanted}")
    return Threshold(text.strip(), quantity, comparison, float(limit), unit)
