"""Spans of time to a `Server-Timing` header, and histograms of them with buckets of our own.

TorchServe's own histograms have fixed buckets that fit neither batch sizes nor milliseconds, and MMS
has none. So each worker counts for itself, under the same names on both servers, and writes its
counts to a small JSON file; `beeline serve status` adds up the answers in it.
"""

from __future__ import annotations

import bisect
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Upper bounds, inclusive, as Prometheus has them; one more bucket counts what is over the last.
BATCH_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
MILLISECOND_BUCKETS = (1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000)


class Histogram:
    """Counts of observations by upper bound, with their sum; not cumulative until it is exposed."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def to_dict(self) -> dict[str, Any]:
        """Return bounds, counts (one more than bounds) and sum."""
        return {"bounds": list(self.bounds), "counts": self.counts, "sum": round(self.total, 3)}


class Spans:
    """Milliseconds by name, in the order in which they were first measured."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, (time.perf_counter() - start) * 1000)

    def add(self, name: str, milliseconds: float) -> None:
        """Add to `name`."""
        self.milliseconds[name] = self.milliseconds.get(name, 0.0) + milliseconds


def server_timing(milliseconds: Mapping[str, float]) -> str:
    """Return the value of a `Server-Timing` header: `decode;dur=2.31, forward;dur=9.80`."""
    return ", ".join(f"{name};dur={value:.2f}" for name, value in milliseconds.items())


def queue_milliseconds(request_start: object, now: float | None = None) -> float | None:
    """Return the time since `X-Request-Start`, which the gateway sets; None without a believable one.

    Args:
        request_start: seconds since the epoch, as `t=1700000000.123` or without the `t=`.
        now: seconds since the epoch, for tests.
    """
    if not isinstance(request_start, str):
        return None
    try:
        waited = (time.time() if now is None else now) - float(request_start.removeprefix("t="))
    except ValueError:
        return None
    # Over an hour, or a negative time, is another clock or another unit: omitted, never guessed.
    return waited * 1000 if 0 <= waited < 3600 else None


class Metrics:
    """One worker's counts: answers by status and reason, batch sizes, milliseconds by stage."""

    def __init__(self, model: str, folder: Path | None = None) -> None:
        self.model = model
        self.path = folder / f"{os.getpid()}.json" if folder else None
        self.answers: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.histograms: dict[str, Histogram] = {"batch_size": Histogram(BATCH_SIZE_BUCKETS)}

    @classmethod
    def from_environment(cls, model: str, environ: Mapping[str, str] = os.environ) -> Metrics:
        """Count into the folder `BEELINE_METRICS_DIR`, or in memory only where it is not set."""
        folder = environ.get("BEELINE_METRICS_DIR")
        return cls(model, Path(folder) if folder else None)

    def batch(self, size: int, milliseconds: Mapping[str, float]) -> None:
        """Count one batch of `size` requests and its stages."""
        self.histograms["batch_size"].observe(size)
        for name, value in milliseconds.items():
            key = f"{name}_milliseconds"
            self.histograms.setdefault(key, Histogram(MILLISECOND_BUCKETS)).observe(value)

    def answer(self, status: int, reason: str | None) -> None:
        """Count one answer; `reason` is the request error's short name."""
        self.answers[str(status)] += 1
        if reason:
            self.reasons[reason] += 1

    def write(self) -> None:
        """Write the counts atomically, so that no reader sees half a file.

        Raises:
            OSError: when the folder cannot be written.
        """
        if self.path is None:
            return
        draft = self.path.with_suffix(".tmp")
        draft.write_text(json.dumps(self.to_dict()))
        draft.replace(self.path)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "pid": os.getpid(),
            "model": self.model,
            "answers": dict(self.answers),
            "reasons": dict(self.reasons),
            "histograms": {name: histogram.to_dict() for name, histogram in self.histograms.items()},
        }
