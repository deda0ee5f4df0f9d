"""What is wanted: most throughput within a latency budget, or the lowest latency at a rate."""

from __future__ import annotations

from dataclasses import dataclass

from beeline.errors import ConfigError

# Of the arrivals, so many must be answered in the measured time; the rest is on its way when it ends.
_ANSWERED = 0.97
# A request without an answer for so many seconds, or so many times the budget, has failed: it holds no goal, and
# the next turn waits for it.
_DEADLINE, _TIMES = 10.0, 6


@dataclass(frozen=True)
class Goal:
    """Exactly one of a budget for the 95th percentile (closed loop of `clients`) and a rate (open loop).

    Attributes:
        p95_ms: milliseconds.
        rate: arrivals a second.
        clients: keep-alive connections of the closed loop; the open loop has none.
    """

    p95_ms: float | None = None
    rate: float | None = None
    clients: int = 50

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: naming the one that is impossible.
        """
        if (self.p95_ms is None) == (self.rate is None):
            raise ConfigError("tune needs a goal: either --p95, as in --p95 500ms, or --rate, as in --rate 200")
        for option, value in (("--p95", self.p95_ms), ("--rate", self.rate), ("--clients", self.clients)):
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{option} is {value:g}; give more than 0")

    @property
    def open(self) -> bool:
        """Whether arrivals come whatever the server does."""
        return self.rate is not None

    @property
    def deadline(self) -> float:
        """Seconds after which a request has failed."""
        return max(_DEADLINE, _TIMES * (self.p95_ms or 0.0) / 1000)

    @property
    def text(self) -> str:
        """The goal for people."""
        if self.rate is not None:
            return f"{self.rate:g} arrivals a second"
        return f"p95 of at most {self.p95_ms:g} ms with {self.clients} clients"

    def holds(self, per_second: float, p95_ms: float | None, failed: int, growing: bool) -> bool:
        """Say whether figures reach it; a failed request never does."""
        if failed or p95_ms is None:
            return False
        if self.rate is not None:
            return not growing and per_second >= _ANSWERED * self.rate
        assert self.p95_ms is not None
        return p95_ms <= self.p95_ms

    def to_dict(self) -> dict[str, float]:
        """Return it as a record has it."""
        if self.rate is not None:
            return {"rate": self.rate}
        assert self.p95_ms is not None
        return {"p95_ms": self.p95_ms}


def milliseconds(text: str) -> float:
    """Return the milliseconds in `500ms`, `0.5s` or `500`.

    Raises:
        ConfigError: for anything else.
    """
    wanted = text.strip().lower()
    factor = 1.0
    for unit, times in (("ms", 1.0), ("s", 1000.0)):
        if wanted.endswith(unit):
            wanted, factor = wanted.removesuffix(unit).strip(), times
            break
    try:
        return float(wanted) * factor
    except ValueError:
        raise ConfigError(f"--p95 is {text!r}; give milliseconds or seconds, as in 500ms or 0.5s") from None
