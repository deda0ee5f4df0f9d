"""What the workers of one server counted: the small JSON files that each writes for itself, read back.

A worker that died leaves its file, so its counts stay part of the sums. Whatever else lies in the folder,
and a worker of somebody's own handler may write what it likes there, is passed over.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any

import psutil

Key = tuple[str, str]

_MOST_BYTES = 1_000_000
_MOST = 2**53
# A worker begins to count after its process began; the clock may have been set by this many seconds between.
_CLOCK = 10.0


@dataclass(frozen=True)
class Buckets:
    """A histogram: inclusive upper bounds, counts (one more than bounds, not cumulative), sum of the values."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


@dataclass(frozen=True)
class WorkerCounts:
    """What one worker counted since it loaded its model.

    Attributes:
        file: the file's name, which no other worker of the folder ever has.
        pid: its process, which may have ended.
        started: when it had loaded, in seconds since the epoch.
        model: the served name.
        version: the served version.
        choice: what its engine chose: by name, `value` and `reason`.
        answers: by HTTP status.
        reasons: of errors, by short name.
        histograms: by name; a name's end says the unit.
    """

    file: str
    pid: int
    started: float
    model: str
    version: str
    choice: Mapping[str, Mapping[str, str]]
    answers: Mapping[str, int]
    reasons: Mapping[str, int]
    histograms: Mapping[str, Buckets]

    @property
    def key(self) -> Key:
        """Return model and version."""
        return self.model, self.version


def load(folder: Path) -> list[WorkerCounts]:
    """Return what each worker of a server counted, dead ones too, in the order in which they started."""
    return scan(folder)[0]


def scan(folder: Path) -> tuple[list[WorkerCounts], int]:
    """Return the same, and how many files could not be read as counts."""
    try:
        paths = [path for path in folder.iterdir() if path.suffix != ".tmp"]
    except FileNotFoundError:
        return [], 0
    except OSError:
        return [], 1
    found = [_read(path) for path in paths]
    workers = [one for one in found if one is not None]
    return sorted(workers, key=lambda one: (one.started, one.file)), len(found) - len(workers)


def living(workers: Sequence[WorkerCounts]) -> list[WorkerCounts]:
    """Return those whose process still runs; `workers` in the order in which they started."""
    return [worker for worker in {worker.pid: worker for worker in workers}.values() if _runs(worker)]


def choices(folder: Path) -> dict[Key, dict[str, dict[str, str]]]:
    """Return what the engine chose, by model and version, as the latest living worker says."""
    alive = living(load(folder))
    ordered = sorted(alive, key=lambda one: one.started)
    return {one.key: {name: dict(made) for name, made in one.choice.items()} for one in ordered}


def _runs(worker: WorkerCounts) -> bool:
    """Whether the process runs, and began before the worker did: an id alone may be somebody else's by now."""
    try:
        process = psutil.Process(worker.pid)
        began = process.create_time()
        return process.status() != psutil.STATUS_ZOMBIE and began <= worker.started + _CLOCK
    except psutil.Error:
        return False


def _read(path: Path) -> WorkerCounts | None:
    try:
        seen = path.stat()
        if not S_ISREG(seen.st_mode) or seen.st_size > _MOST_BYTES:
            return None
        return _parse(path, seen.st_mtime_ns, seen.st_ino, seen.st_size)
    except OSError:
        return None


@functools.lru_cache(maxsize=4096)
def _parse(path: Path, changed: int, number: int, size: int) -> WorkerCounts | None:
    """Read a file; once for each of its states, since dead workers' files pile up and never change.

    Raises:
        OSError: when it cannot be read now; that is not remembered.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return WorkerCounts(
            file=path.name,
            pid=_whole(values["pid"]),
            started=_number(values["started"]),
            model=_text(values["model"]),
            version=_text(values["version"]),
            choice={
                _text(name): {"value": _text(made["value"]), "reason": _text(made["reason"])}
                for name, made in values["choice"].items()
            },
            answers={_text(status): _whole(count) for status, count in values["answers"].items()},
            reasons={_text(reason): _whole(count) for reason, count in values["reasons"].items()},
            histograms={_text(name): _buckets(value) for name, value in values["histograms"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _buckets(values: Mapping[str, Any]) -> Buckets:
    bounds = tuple(_number(bound) for bound in values["bounds"])
    counts = tuple(_whole(count) for count in values["counts"])
    if len(counts) != len(bounds) + 1 or list(bounds) != sorted(set(bounds)):
        raise ValueError("not the bounds and counts of a histogram")
    return Buckets(bounds, counts, _number(values["sum"]))


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MOST:
        raise ValueError(f"{value!r} is no count")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < _MOST:
        raise ValueError(f"{value!r} is no number from 0")
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    # A lone surrogate, which JSON may hold, could not be written into an answer.
    value.encode()
    return value
