"""Training runs on disk: a folder each, complete only when its `run.json` is there."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from host.files import is_locked, try_lock, write_json
from train.config import TrainConfig, load
from train.data import CACHE, VARIABLE, LabelledPictures, read
from train.errors import DataError, RunError

RUNS = Path(__file__).resolve().parents[1] / "runs"
RECORD = "run.json"
# Of a run that is not finished: what it was planned as, and its last whole epoch.
PLANNED, CHECKPOINT = "planned.json", "last.ckpt"
# The list of training, validation and watched pictures: split, label, path, sha256.
PICTURES = "pictures.csv"
# Stands for the newest finished run wherever a run is named.
LATEST = "latest"
SCHEMA = 1


@dataclass(frozen=True)
class Epoch:
    """One row of `metrics.csv`: losses are means, accuracies 0 to 1, wall seconds. Epoch 0 is the head alone.

    `watched_loss` is that of the pictures that decide when to stop; None where nothing decides it. Under the score
    `not_sure_under` the best label of a validation picture is often wrong; see `model.guess_under`.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    seconds: float
    watched_loss: float | None = None
    not_sure_under: float | None = None


Report = Callable[[Sequence[Epoch]], None]


def ignore(rows: Sequence[Epoch]) -> None:
    """Do nothing with the rows of a fit."""


@dataclass(frozen=True)
class Run:
    """A finished run: `folder` and the content of its `run.json`."""

    folder: Path
    record: dict[str, Any]

    @property
    def id(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the run's plan."""
        return str(self.record["fingerprint"])

    @property
    def labels(self) -> tuple[str, ...]:
        """The class names, in the order of the outputs."""
        return tuple(self.record["labels"])

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy on the validation pictures after the last epoch, 0 to 1."""
        return float(self.record["accuracy"])

    @property
    def checkpoint(self) -> Path:
        """The state dict."""
        return self.folder / "checkpoint.pth"

    @property
    def export(self) -> Path:
        """The exported folder."""
        return self.folder / "export"

    @property
    def seen(self) -> frozenset[str] | None:
        """The sha256 of each training picture; None of a run from before they were kept."""
        path = self.folder / PICTURES
        if not path.is_file():
            return None
        with path.open(newline="", encoding="utf-8") as file:
            return frozenset(row["sha256"] for row in csv.DictReader(file) if row["split"] != "val")

    def config(self) -> TrainConfig:
        """Return the resolved configuration of the run."""
        return load(self.folder / "config.yaml")


def find_folder(name: Path) -> Path:
    """Return the run's folder for a folder, an id under `runs/`, or `latest`, the newest finished run; else `name`.

    Raise `RunError` where `latest` finds none.
    """
    if name.is_dir():
        return name
    if str(name) == LATEST:
        if (newest := next(finished(RUNS), None)) is None:
            raise RunError(f"there is no finished run in {RUNS}, so none is the latest; train one with `beeline train`")
        return newest.folder
    return RUNS / name if (RUNS / name).is_dir() else name


def open_run(folder: Path) -> Run:
    """Return the finished run that `find_folder` finds; raise `RunError` for one that is none."""
    folder = find_folder(folder)
    path = folder / RECORD
    if not path.is_file():
        why = "was not finished (it has no run.json)" if folder.is_dir() else "is missing"
        raise RunError(f"the run {folder} {why}; train again, or name another of {RUNS}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["schema"] != SCHEMA:
            raise ValueError(f"its schema is {record['schema']}, this Beeline reads {SCHEMA}")
        run = Run(folder, record)
        _ = run.fingerprint, run.labels, run.accuracy
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}); train again") from error
    return run


def finished(runs: Path = RUNS) -> Iterator[Run]:
    """Yield the finished runs, newest first; unfinished and damaged runs are skipped."""
    for folder in sorted((path.parent for path in runs.glob(f"*/{RECORD}")), reverse=True):
        try:
            yield open_run(folder)
        except RunError:
            continue


def find_run(fingerprint: str, runs: Path = RUNS) -> Path | None:
    """Return the folder of the newest finished run with this fingerprint that still has its checkpoint."""
    same = (run for run in finished(runs) if run.fingerprint == fingerprint and run.checkpoint.is_file())
    return next((run.folder for run in same), None)


def unfinished(folder: Path) -> dict[str, Any]:
    """Return what a run that can be resumed was planned as; raise `RunError` for another folder."""
    if (folder / RECORD).is_file():
        raise RunError(f"the run {folder} is finished; train without --resume")
    try:
        planned: dict[str, Any] = json.loads((folder / PLANNED).read_text(encoding="utf-8"))
        _ = planned["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"the run {folder} cannot be resumed (no {PLANNED} of it can be read); train again") from error
    if is_locked(folder / PLANNED):
        raise RunError(f"the run {folder} is being trained by another process; wait for it, or stop it")
    return planned


def find_unfinished(fingerprint: str, runs: Path = RUNS) -> Path | None:
    """Return the folder of the newest run with this fingerprint that was interrupted after an epoch."""
    for checkpoint in sorted(runs.glob(f"*/{CHECKPOINT}"), reverse=True):
        with suppress(RunError):
            if unfinished(checkpoint.parent)["fingerprint"] == fingerprint:
                return checkpoint.parent
    return None


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a run that is being trained; the kernel lets go of it however the process ends."""
    lock = try_lock(folder / PLANNED)
    if lock is None:
        raise RunError(f"the run {folder} is being trained by another process; wait for it, or stop it")
    try:
        yield
    finally:
        os.close(lock)


def create(name: str, fingerprint: str, runs: Path = RUNS) -> Path:
    """Make a folder for a new run, named by time, model and fingerprint, so that names sort by age."""
    first = folder = runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-{fingerprint[:6]}"
    count = 1
    runs.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            count += 1
            folder = first.with_name(f"{first.name}-{count}")


def finish(folder: Path, record: dict[str, Any]) -> Run:
    """Write `run.json`, the last file of a run, whole or not at all."""
    values = {"schema": SCHEMA, "id": folder.name, **record}
    write_json(folder / RECORD, values, sync=True)
    for name in (CHECKPOINT, PLANNED):
        (folder / name).unlink(missing_ok=True)
    return Run(folder, values)


def validation_pictures(run: Run, cache: Path = CACHE, environ: Mapping[str, str] = os.environ) -> LabelledPictures:
    """Return the run's validation pictures; raise `DataError` when they are gone or changed.

    They are looked for where the run found them, in `BEELINE_DATA`, and among downloaded and generated pictures.
    """
    config, recorded = run.config().data, run.record["data"]
    named = [Path(folder).expanduser() for folder in (config.folder, environ.get(VARIABLE)) if folder]
    kept = cache.glob("generated-*" if recorded["generated"] else f"{recorded['name']}-*")
    folders = list(dict.fromkeys([*named, *sorted(path for path in kept if path.is_dir())]))
    for folder in folders:
        try:
            data = read(folder, config.held_out, recorded["name"], damaged=config.damaged)
        except (DataError, OSError):
            continue
        if data.digest == recorded["digest"]:
            return data.val
    where = ", ".join(map(str, folders)) or str(cache)
    raise DataError(f"the pictures of the run {run.id} are no longer as they were in {where}; bring them back")
