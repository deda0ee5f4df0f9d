"""One worker's metrics, under the same names on both servers, by prometheus_client in its multiprocess mode.

TorchServe's own histograms have fixed buckets that fit neither batch sizes nor milliseconds, and MMS has none. So each
worker counts in files of its own, mapped into its memory, and the exporter of `/metrics` adds up all workers' files.
A small JSON file per worker says which model it serves and what its engine chose.
"""

from __future__ import annotations

import collections
import functools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from beeline.files import write_whole

if TYPE_CHECKING:
    from prometheus_client import Counter, Histogram

    from beeline.answer import Answer

logger = logging.getLogger(__name__)

# Names the folder; the library reads it too. Without it nothing is counted.
FOLDER = "PROMETHEUS_MULTIPROC_DIR"
# Inclusive upper bounds. Workers of older archives are added up bound by bound, so other bounds need another name.
BATCH_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
SECOND_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
# A full queue may keep a request until its client times out, after minutes.
QUEUE_BUCKETS = (*SECOND_BUCKETS, 10, 30, 60, 120)
_HISTOGRAMS = {
    "batch_size": ("Requests in a batch.", BATCH_SIZE_BUCKETS),
    "queue_seconds": ("Time of a request from its arrival at the gateway until its batch was begun.", QUEUE_BUCKETS),
    "decode_seconds": ("Time of a batch in decoding its pictures.", SECOND_BUCKETS),
    "forward_seconds": ("Time of a batch in the model.", SECOND_BUCKETS),
    "encode_seconds": ("Time of a batch in writing its answers.", SECOND_BUCKETS),
}
_OF_MODEL = ("model", "version")
# Times are whole multiples of this, about a microsecond, so that their sum does not depend on the order of the files.
# Otherwise the sum could fall by a rounding error, which Prometheus takes for a restart from zero.
_UNIT = 2.0**-20
# Bytes of each file, as the library makes it; the metrics of one model need a third of it.
_SIZE = 1 << 16


def identity(pid: int) -> str:
    """Return `PID-START`, which no other process of this machine has; empty if the process has ended.

    START counts clock ticks since the kernel's own start, so a change of the clock does not change it.
    """
    try:
        # The program's name, in brackets, may hold any character.
        values = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if values[0] in b"ZX" else f"{pid}-{int(values[19])}"


class Metrics:
    """One worker's counts: answers by status and reason, batch sizes, seconds by stage and in the queue."""

    def __init__(self, model: str, version: str, choice: Mapping[str, Mapping[str, str]]) -> None:
        """Begin at zero; an error is logged once, and the worker serves without metrics.

        `choice` is what the engine chose: by name, `value` and `reason`.
        """
        self._labels = (model, version)
        self._counters: tuple[Counter, Counter] | None = None
        self._histograms: dict[str, Histogram] = {}
        folder = os.environ.get(FOLDER)
        if not folder:
            return
        try:
            name = identity(os.getpid())
            about = {"model": model, "version": version, "choice": choice}
            write_whole(Path(folder, f"{name}.json"), json.dumps(about))
            self._open(Path(folder), name)
        except ImportError as error:
            logger.warning("this worker serves without metrics: %s", error)
        except Exception:
            logger.exception("this worker serves without metrics: it cannot count in %s", folder)

    def count(
        self, answers: Sequence[Answer], queues: Sequence[float | None], milliseconds: Mapping[str, float]
    ) -> None:
        """Count one batch; raises nothing.

        `queues` are the milliseconds of each request in the queue, None where unknown; `milliseconds` are the batch's,
        by stage.
        """
        if self._counters is None:
            return
        try:
            self._histograms["batch_size"].observe(len(answers))
            for name, value in [("queue", queue) for queue in queues] + [*milliseconds.items()]:
                if value is not None and f"{name}_seconds" in self._histograms:
                    self._histograms[f"{name}_seconds"].observe(int(value / 1000 / _UNIT) * _UNIT)
            by_status, by_reason = self._counters
            for status, number in collections.Counter(int(answer.status) for answer in answers).items():
                by_status.labels(*self._labels, status).inc(number)
            for reason, number in collections.Counter(answer.reason for answer in answers if answer.reason).items():
                # The exporter could not write a lone surrogate.
                by_reason.labels(*self._labels, reason.encode(errors="replace").decode()).inc(number)
        except Exception:
            logger.exception("this worker counts no more")
            self._counters = None

    def _open(self, folder: Path, name: str) -> None:
        """Make the files, each histogram at zero, and count this start."""
        from prometheus_client import Counter, Histogram, values

        for kind in ("counter", "histogram"):
            path = folder / f"{kind}_{name}.db"
            if not path.exists():
                # Every byte is written now: a page that a full disk has no space for kills this process (SIGBUS).
                write_whole(path, bytes(_SIZE))
        # The library asks at each count, since a process may fork. The kernel reuses process ids.
        named = functools.lru_cache(identity)
        values.ValueClass = values.MultiProcessValue(lambda: named(os.getpid()))  # type: ignore[no-untyped-call]
        starts = "Workers that have loaded their model since the server's start."
        Counter("beeline_worker_starts", starts, _OF_MODEL, registry=None).labels(*self._labels).inc()
        for key, (text, bounds) in _HISTOGRAMS.items():
            family = Histogram(f"beeline_{key}", text, _OF_MODEL, registry=None, buckets=bounds)
            self._histograms[key] = family.labels(*self._labels)
        status, reason = (*_OF_MODEL, "status"), (*_OF_MODEL, "reason")
        self._counters = (
            Counter("beeline_answers", "Answers of the workers by HTTP status.", status, registry=None),
            Counter("beeline_errors", "Answers that are errors, by their reason.", reason, registry=None),
        )
