"""One rung of the ladder: a batch size and what each stage took at it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Each stage includes those before it. `forward` has its batch on the device already; `copied` stacks the
# decoded rows and brings them there; `decoded` begins with the encoded pictures; `handler` is all that a
# worker does for a batch.
STAGES = ("forward", "copied", "decoded", "handler")
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Timing:
    """One stage at one batch size: median and quartiles of a batch's milliseconds, and the median for one image."""

    median_ms: float
    low_ms: float
    high_ms: float
    ms_per_image: float

    @classmethod
    def of(cls, milliseconds: Sequence[float], batch: int) -> Timing:
        """Sum up a stage's samples, each the milliseconds of one batch."""
        if len(milliseconds) == 1:
            low = median = high = milliseconds[0]
        else:
            low, median, high = statistics.quantiles(milliseconds, n=4, method="inclusive")
        return cls(round(median, 4), round(low, 4), round(high, 4), round(median / batch, 5))


@dataclass(frozen=True)
class Row:
    """One batch size: the stages' timings by name, or why there are none."""

    batch: int
    stages: Mapping[str, Timing]
    repeats: int = 0
    error: str | None = None

    @classmethod
    def of(cls, batch: int, samples: Mapping[str, Sequence[float]]) -> Row:
        """Sum up each stage's samples."""
        timings = {stage: Timing.of(samples[stage], batch) for stage in STAGES}
        return cls(batch, timings, len(samples[STAGES[0]]))

    def per_image(self, stage: str) -> float:
        """Return a stage's milliseconds for one image."""
        return self.stages[stage].ms_per_image

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; the stages of a row with an error are null."""
        timings = {stage: vars(self.stages[stage]) if stage in self.stages else None for stage in STAGES}
        return {"batch": self.batch, "error": self.error, "repeats": self.repeats, **timings}
