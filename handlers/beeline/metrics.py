"""One worker's counts, under the same names on both servers, in histograms with buckets of our own.

TorchServe's own histograms have fixed buckets that fit neither batch sizes nor milliseconds, and MMS
has none. So each worker counts for itself and writes its counts to a small JSON file; `beeline serve status` and the
exporter of `/metrics` add up all workers'.
"""

from __future__ import annotations

import bisect
import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from beeline.answer import Answer
from beeline.files import write_whole

logger = logging.getLogger(__name__)

# Upper bounds, inclusive, as Prometheus has them; one more bucket counts what is over the last.
BATCH_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
MILLISECOND_BUCKETS = (1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000)
# A full queue keeps a request for as long as its client is given, which is minutes.
QUEUE_BUCKETS = (*MILLISECOND_BUCKETS, 10_000, 30_000, 60_000, 120_000)
STAGES = ("decode", "forward", "encode")
# Seconds between two writes of the counts, and until the next attempt after one that failed.
INTERVAL, RETRY = 0.25, 5.0


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
        return {"bounds": list(self.bounds), "counts": list(self.counts), "sum": round(self.total, 3)}


class Metrics:
    """One worker's counts: answers by status and reason, batch sizes, milliseconds by stage and in the queue.

    They are written by a thread of their own: a write costs a fifth of a millisecond on a disk, and
    minutes on one that hangs, and no batch is to wait for that. The file is named after the process id and
    the start, so that a worker with a dead one's id never overwrites what the dead one counted.
    """

    def __init__(
        self, model: str, version: str, choice: Mapping[str, Mapping[str, str]], folder: Path | None = None
    ) -> None:
        """Begin at zero.

        Args:
            model: the served name.
            version: the served version.
            choice: what the engine chose: by name, `value` and `reason`.
            folder: where the file goes; None to count in memory only.
        """
        self.model, self.version, self.choice = model, version, choice
        started = time.time_ns()
        self.started = started / 1e9
        self.path = folder / f"{os.getpid()}-{started}.json" if folder else None
        self.answers: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.histograms = {"batch_size": Histogram(BATCH_SIZE_BUCKETS), "queue_milliseconds": Histogram(QUEUE_BUCKETS)}
        self.histograms |= {f"{stage}_milliseconds": Histogram(MILLISECOND_BUCKETS) for stage in STAGES}
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._changed = threading.Event()
        self._failed = False

    @classmethod
    def from_environment(
        cls,
        model: str,
        version: str,
        choice: Mapping[str, Mapping[str, str]],
        environ: Mapping[str, str] = os.environ,
    ) -> Metrics:
        """Count into the folder `BEELINE_METRICS_DIR`, or in memory only where it is not set."""
        folder = environ.get("BEELINE_METRICS_DIR")
        return cls(model, version, choice, Path(folder) if folder else None)

    def start(self) -> None:
        """Write now, so that the worker is seen before its first batch, and from now on soon after each batch."""
        if self.path is not None:
            self._try_to_write()
            threading.Thread(target=self._keep, name="metrics", daemon=True).start()

    def count(
        self, answers: Sequence[Answer], queues: Sequence[float | None], milliseconds: Mapping[str, float]
    ) -> None:
        """Count one batch.

        Args:
            answers: one a request.
            queues: each request's milliseconds in the queue, None where unknown.
            milliseconds: the batch's, by stage.
        """
        with self._lock:
            self.histograms["batch_size"].observe(len(answers))
            for queue in queues:
                if queue is not None:
                    self.histograms["queue_milliseconds"].observe(queue)
            for name, value in milliseconds.items():
                key = f"{name}_milliseconds"
                self.histograms.setdefault(key, Histogram(MILLISECOND_BUCKETS)).observe(value)
            for answer in answers:
                self.answers[str(int(answer.status))] += 1
                if answer.reason:
                    self.reasons[str(answer.reason)] += 1
        self._changed.set()

    def write(self) -> None:
        """Write the counts atomically, so that no reader sees half a file.

        Raises:
            OSError: when the folder cannot be written.
        """
        if self.path is None:
            return
        with self._writing:
            write_whole(self.path, json.dumps(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        with self._lock:
            return {
                "pid": os.getpid(),
                "started": self.started,
                "model": self.model,
                "version": self.version,
                "choice": {name: dict(made) for name, made in self.choice.items()},
                "answers": dict(self.answers),
                "reasons": dict(self.reasons),
                "histograms": {name: histogram.to_dict() for name, histogram in self.histograms.items()},
            }

    def _keep(self) -> None:
        """Write after each change, at once after a pause and otherwise at most every `INTERVAL`."""
        while True:
            self._changed.wait()
            self._changed.clear()
            time.sleep(INTERVAL if self._try_to_write() else RETRY)

    def _try_to_write(self) -> bool:
        """Write, or leave it to the next attempt; a full disk is told once, not four times a second."""
        try:
            self.write()
            self._failed = False
        except Exception:
            if not self._failed:
                logger.exception("the metrics cannot be written to %s", self.path)
            self._failed = True
            self._changed.set()
        return not self._failed
