"""A CSV file as a data set: a line a picture, with its path, its label and, where the halves are given, its half."""

from __future__ import annotations

import csv
import hashlib
import os
from functools import cached_property
from pathlib import Path

from host import Say, silent
from train import data
from train.data import DataSet, LabelledPictures, Picture
from train.errors import DataError
from train.index import Fact, examine

_COLUMNS = ("path", "label", "split")
_Row = tuple[Path, str, str]
_HALVES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


class Rows(LabelledPictures):
    """Pictures whose labels are no folders, so that their digest covers the labels too."""

    @cached_property
    def digest(self) -> str:
        """The sha256 over path, label and content of every picture."""
        lines = [f"{label}  {path.relative_to(self.root).as_posix()}\n" for path, label in self.labelled()]
        return hashlib.sha256((super().digest + "".join(sorted(lines))).encode()).hexdigest()


def read_table(
    file: Path,
    held_out: float = 0.2,
    name: str | None = None,
    source: str = "",
    damaged: str = data.REFUSE,
    say: Say = silent,
) -> DataSet:
    """Read the columns `path`, relative to the file's folder or absolute, `label` and, if it is there, `split`.

    Without `split` (train or val) a share of each label is held out. `damaged` and `say` are those of `data.read`.
    Raise `DataError` for a file or a picture that is missing or unreadable, a line without a label, one label only, or
    a label that only one half has.
    """
    rows = [row for row in _rows(file) if row[2] != "test"]
    missing = [path for path, *_ in rows if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        names = ", ".join(map(str, missing[:3])) + more
        raise DataError(f"{len(missing)} of {len(rows)} pictures of {file} are missing: {names}; correct their paths")
    labels = tuple(sorted({label for _, label, _ in rows}))
    if len(labels) < 2:
        raise DataError(f"{file} has only the label {', '.join(labels)!r}; a classifier needs two or more")
    root = Path(os.path.commonpath([path.parent for path, *_ in rows]))
    given = {half for *_, half in rows}
    for half in () if given == {""} else ("train", "val"):
        if lacking := sorted(set(labels) - {label for _, label, own in rows if own == half}):
            raise DataError(f"{file} has no pictures of {lacking[0]!r} whose split is {half}; add some")
    facts = examine(root, [path for path, *_ in rows], say)
    halves = {half: _half(half, rows, facts, root, labels) for half in given}
    data.whole(list(halves.values()), damaged, say)
    name = name or file.stem
    if everything := halves.get(""):
        return DataSet(name, source, *data.split(everything, held_out), f"{held_out:.0%} of each class held out")
    return DataSet(name, source, halves["train"], halves["val"], f"the column split of {file.name}")


def labelled_rows(file: Path, say: Say = silent) -> Rows:
    """Return the pictures of the lines whose split is val, else test, else of all, as `data.labelled_pictures` does."""
    rows = _rows(file)
    rows = next(filter(None, ([row for row in rows if row[2] == half] for half in ("val", "test"))), rows)
    labels, paths = tuple(sorted({label for _, label, _ in rows})), [path for path, *_ in rows]
    facts = examine(file.parent, paths, say)
    pictures = tuple(Picture(path, labels.index(label), facts[path].sha256) for path, label, _ in rows)
    return Rows(file, labels, pictures)


def _half(half: str, rows: list[_Row], facts: dict[Path, Fact], root: Path, labels: tuple[str, ...]) -> Rows:
    pictures, damaged = [], []
    for path, label, own in rows:
        fact = facts[path]
        if own == half and (fact.fault or not fact.kind):
            damaged.append(f"{path}: {fact.fault or 'no picture by its first bytes'}")
        elif own == half:
            pictures.append(Picture(path, labels.index(label), fact.sha256))
    return Rows(root, labels, tuple(pictures), (), tuple(damaged))


def _rows(file: Path) -> list[tuple[Path, str, str]]:
    """Return path, label and half ("", train, val or test) of each line; a path that comes twice is an error."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, skipinitialspace=True)
            columns = {name.strip().lower(): name for name in reader.fieldnames or ()}
            if not {*_COLUMNS[:2]} <= columns.keys():
                raise DataError(f"{file} has the columns {', '.join(columns) or '(none)'}; name them path and label")
            names = [columns.get(each) for each in _COLUMNS]
            taken = [[(row[name] or "").strip() if name is not None else "" for name in names] for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read as CSV ({error}); save it as UTF-8 with a line path,label") from error
    rows: dict[Path, tuple[Path, str, str]] = {}
    for number, (path, label, half) in enumerate(taken, 2):
        known = next((name for name, words in _HALVES.items() if half.lower() in words), "")
        whole = Path(os.path.normpath(file.parent.absolute() / path))
        if not path or not label or (half and not known) or ("split" in columns) != bool(known):
            raise DataError(f"line {number} of {file} is {path},{label},{half}; give path, label, split (train or val)")
        if whole in rows:
            raise DataError(f"line {number} of {file} names {path} again; keep one line a picture")
        rows[whole] = (whole, label, known)
    return list(rows.values())
