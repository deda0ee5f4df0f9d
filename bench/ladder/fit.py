"""A batch's time as a line: so much an image, and so much a batch whatever its size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Fit:
    """milliseconds(n) = a_ms * n + b_ms; `error` is the largest relative difference from a measured point."""

    a_ms: float
    b_ms: float
    error: float

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"a_ms": round(self.a_ms, 4), "b_ms": round(self.b_ms, 4), "error": round(self.error, 4)}

    @property
    def images_lost(self) -> float:
        """Return the fixed cost of a batch in images; a batch of so many runs at half the speed of a large one."""
        return max(0.0, self.b_ms) / self.a_ms if self.a_ms > 0 else float("inf")


def fit(points: Sequence[tuple[int, float]]) -> Fit | None:
    """Fit the line through points of batch size and a batch's milliseconds, each weighing by its share.

    A plain fit would let the largest batches, whose milliseconds are hundreds, decide alone.

    Returns:
        None for fewer than two batch sizes, through which there is no line.
    """
    if len({batch for batch, _ in points}) < 2:
        return None
    sizes = np.array([batch for batch, _ in points], float)
    times = np.array([milliseconds for _, milliseconds in points], float)
    system = np.stack([sizes, np.ones_like(sizes)], axis=1) / times[:, None]
    (a, b), *_ = np.linalg.lstsq(system, np.ones_like(times), rcond=None)
    error = float(np.abs((a * sizes + b) / times - 1).max())
    return Fit(float(a), float(b), error)
