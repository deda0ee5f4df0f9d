"""The counts of one server's workers: prometheus_client's files of every process, added up.

The library keeps the files of every process that has ever run. So the gateway folds the files of ended processes into
one of each kind, while a lock keeps readers away. A record, written in one step, lists the files that the folded ones
replace, so that every answer counts exactly once even if the gateway is killed in between.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector

from beeline.errors import BeelineError
from beeline.metrics import identity
from host.files import locked, write_json, write_whole

logger = logging.getLogger(__name__)

# A model's name and version.
Key = tuple[str, str]
_KINDS = ("counter", "histogram")
_LOCK, _RECORD = "lock", "folded.json"
# A worker's files are `PID-START.json`, `counter_PID-START.db`, `histogram_PID-START.db`.
_NAME = re.compile(rf"(?:(?:{'|'.join(_KINDS)})_)?((\d+)-(\d+))\.(json|db)")
# Reading a file that no worker wrote may raise these.
_FOREIGN = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, struct.error)
_FOLDED = re.compile(rf"(?:{'|'.join(_KINDS)})_folded-\d+\.db")


@dataclass(frozen=True)
class Worker:
    """One worker that has loaded its model: `PID-START`, and its engine's choices, each with `value` and `reason`."""

    identity: str
    key: Key
    choice: Mapping[str, Mapping[str, str]]


@dataclass
class Counts:
    """The contents of a metrics folder."""

    # Those whose files are not folded, in the order in which their processes started.
    workers: list[Worker] = field(default_factory=list)
    # The identities of ended processes that still have files.
    ended: set[str] = field(default_factory=set)
    files: list[Path] = field(default_factory=list)
    # How many files no worker can have written.
    unreadable: int = 0

    def families(self, kind: str = "") -> list[Metric]:
        """Return the sums over all processes, of one kind of files or of all; call it with the lock held."""
        files = [path for path in self.files if path.name.startswith(kind)]
        try:
            return _merge(files)
        except _FOREIGN:
            good = [path for path in files if _is_readable(path)]
            self.unreadable += len(files) - len(good)
            return _merge(good)

    def living(self) -> list[Worker]:
        """Return the workers whose process still runs."""
        return [worker for worker in self.workers if worker.identity not in self.ended]

    def counting(self) -> set[Key]:
        """Return model and version of each living worker that has files of counts."""
        names = {path.stem.rpartition("_")[2] for path in self.files}
        return {worker.key for worker in self.living() if worker.identity in names}

    def choices(self) -> dict[Key, dict[str, Any]]:
        """Return the engine's choices by model and version, as the latest living worker has them."""
        return {worker.key: dict(worker.choice) for worker in self.living()}


def lock(folder: Path) -> AbstractContextManager[None]:
    """Return a context in which nobody folds files; it raises OSError if there is no such folder."""
    return locked(folder / _LOCK)


def scan(folder: Path) -> Counts:
    """Return the contents of the folder; call it with the lock held."""
    record = _record(folder)
    counts = Counts(files=[folder / name for name in record["files"]])
    started: dict[str, tuple[int, int]] = {}
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        if path.name in (_LOCK, _RECORD, *record["gone"]) or path.suffix == ".tmp" or _FOLDED.fullmatch(path.name):
            continue
        try:
            if match is None or not path.is_file():
                raise ValueError("no worker's file")
            if match[4] == "db":
                counts.files.append(path)
            else:
                counts.workers.append(_worker(path))
        except (OSError, *_FOREIGN):
            counts.unreadable += 1
            continue
        started[match[1]] = int(match[3]), int(match[2])
        if identity(int(match[2])) != match[1]:
            counts.ended.add(match[1])
    counts.workers.sort(key=lambda worker: started[worker.identity])
    return counts


def read(folder: Path) -> Counts:
    """Return the contents of a folder, which may be missing."""
    try:
        with lock(folder):
            return scan(folder)
    except FileNotFoundError:
        return Counts()


def answers(folder: Path) -> dict[str, dict[str, int]] | None:
    """Return the number of answers by model and status; None if no worker counts."""
    total: dict[str, dict[str, int]] = {}
    try:
        with lock(folder):
            counts = scan(folder)
            families = counts.families("counter")
    except FileNotFoundError:
        return None
    for sample in (sample for family in families if family.name == "beeline_answers" for sample in family.samples):
        total.setdefault(sample.labels["model"], Counter())[sample.labels.get("status", "")] += int(sample.value)
    return total if counts.files else None


def empty(folder: Path) -> None:
    """Make an empty folder for a new server's workers; raise BeelineError if an earlier worker still counts there."""
    if living := read(folder).living():
        raise BeelineError(
            f"earlier workers still count in {folder} ({', '.join(one.identity for one in living)}, each a process id "
            "with its start); end them, then try again"
        )
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(mode=0o700)


def fold(folder: Path, counts: Counts) -> None:
    """Fold the files of ended processes into one of each kind; call it with the lock held, with the result of `scan`.

    Raise OSError if the folder cannot be written; nothing is lost then.
    """
    record = _record(folder)
    # The files that a killed gateway did not remove.
    folded = [path.name for path in folder.iterdir() if _FOLDED.fullmatch(path.name)]
    _remove(folder, [*record["gone"], *folded], record)
    if not counts.ended:
        return
    number, files, gone = record["number"] + 1, [], [f"{ended}.json" for ended in counts.ended]
    for kind in _KINDS:
        of_ended = {*record["files"], *(f"{kind}_{ended}.db" for ended in counts.ended)}
        parts = [path for path in counts.files if path.name.startswith(kind) and path.name in of_ended]
        sums: Counter[str] = Counter()
        for part in parts:
            if not _is_readable(part):
                logger.error("%s holds no counts and its worker has ended: it is removed", part)
                continue
            for key, value, _, _ in MmapedDict.read_all_values_from_file(str(part)):  # type: ignore[no-untyped-call]
                sums[key] += value
        target = folder / f"{kind}_folded-{number}.db"
        # Every byte is written now, because a full disk would kill this process when it writes into a mapped file.
        write_whole(target, bytes(64 + sum(40 + len(key.encode()) for key in sums)))
        total = MmapedDict(str(target))  # type: ignore[no-untyped-call]
        for key, value in sums.items():
            total.write_value(key, value, 0.0)  # type: ignore[no-untyped-call]
        total.close()  # type: ignore[no-untyped-call]
        files.append(target.name)
        gone += [part.name for part in parts]
    record = {"number": number, "files": files, "gone": gone}
    write_json(folder / _RECORD, record)
    _remove(folder, gone, record)


def _remove(folder: Path, names: Iterable[str], record: Mapping[str, Any]) -> None:
    for name in {*names} - {*record["files"]}:
        (folder / name).unlink(missing_ok=True)


def _record(folder: Path) -> dict[str, Any]:
    """Return the names of the folded files, and of the files that they replace."""
    values: dict[str, Any] = {"number": 0, "files": [], "gone": []}
    with suppress(FileNotFoundError):
        values |= json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    return values


def _merge(paths: Iterable[Path]) -> list[Metric]:
    """Add up files; raise one of `_FOREIGN` for counts that no worker writes, such as those that cannot be sent."""
    merged: list[Metric] = list(MultiProcessCollector.merge([str(path) for path in paths]))  # type: ignore[no-untyped-call]
    for sample in (sample for family in merged for sample in family.samples):
        if not math.isfinite(sample.value):
            raise ValueError(f"{sample.name} is {sample.value}")
        "".join((sample.labels["model"], *sample.labels.values())).encode()
    return merged


def _is_readable(path: Path) -> bool:
    try:
        _merge([path])
    except _FOREIGN:
        return False
    return True


def _worker(path: Path) -> Worker:
    values = json.loads(path.read_text(encoding="utf-8"))
    choice = {name: {"value": each["value"], "reason": each["reason"]} for name, each in values["choice"].items()}
    # It raises for what is no text, and for text that cannot be sent.
    "".join((values["model"], values["version"])).encode()
    return Worker(path.stem, (values["model"], values["version"]), choice)
