"""Labelled picture folders: find one, read it, split it, and name the files that are no pictures."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from host import ROOT, Say, silent
from host.files import CIRCLE, HIDDEN, is_hidden, listed, sha256, walk
from train.download import NAME, hymenoptera, pictures
from train.errors import DataError, Unavailable
from train.generate import LABELS as GENERATED_LABELS
from train.generate import generate
from train.index import Fact, examine

CACHE = ROOT / ".beeline" / "data"
VARIABLE = "BEELINE_DATA"

# A file with another ending, or none, is a picture too if its first bytes are. GIF is left out, as in torchvision's
# ImageFolder: such files are drawings, animations and "image not found" signs. The worker accepts them.
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff")
# What people call the halves of a set: in any case, with the other words or without, as `seg_train`, `Test images`.
_HALVES = {"train": "train training", "val": "val valid validation eval evaluation dev", "test": "test testing holdout"}
_WITH = {"set", "seg", "data", "dataset", "image", "images", "img", "imgs", "pictures", "split", "folder"}
REFUSE, LEAVE_OUT = "refuse", "leave_out"
_MOST_LINES = 100
_GENERATED = f"using GENERATED pictures of {' and '.join(GENERATED_LABELS)} (a drawn set, no photographs)"


@dataclass(frozen=True)
class Picture:
    """One file, the index of its label, and the digest of its bytes where that is known."""

    path: Path
    truth: int
    sha256: str = ""


@dataclass(frozen=True)
class LabelledPictures:
    """Pictures under `root`, one folder a class; labels are the folders' names, sorted.

    `skipped` are files that are hidden or no pictures; `damaged` are pictures that cannot be read, with the reason.
    """

    root: Path
    labels: tuple[str, ...]
    pictures: tuple[Picture, ...]
    skipped: tuple[Path, ...] = ()
    damaged: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pictures)

    def counts(self) -> dict[str, int]:
        """Return the number of pictures of each label."""
        found = Counter(picture.truth for picture in self.pictures)
        return {label: found[index] for index, label in enumerate(self.labels)}

    def labelled(self) -> list[tuple[Path, str | None]]:
        """Return each picture's path and label."""
        return [(picture.path, self.labels[picture.truth]) for picture in self.pictures]

    @cached_property
    def digest(self) -> str:
        """The sha256 over path and content of every picture; equal digests are equal data."""
        lines = [
            f"{each.sha256 or sha256(each.path)}  {each.path.relative_to(self.root).as_posix()}\n"
            for each in self.pictures
        ]
        return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


@dataclass(frozen=True)
class DataSet:
    """Training and validation pictures.

    `name` is its name in reports; `source` says where it came from, and `split` how the two halves were separated.
    `notes` are sentences on what was not taken as it lies there.
    """

    name: str
    source: str
    train: LabelledPictures
    val: LabelledPictures
    split: str
    generated: bool = False
    notes: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """The class names, in the order of the model's outputs."""
        return self.train.labels

    @property
    def digest(self) -> str:
        """The sha256 over both halves and the split."""
        return hashlib.sha256(f"{self.train.digest}{self.val.digest}{self.split}".encode()).hexdigest()


def find_data(
    folder: Path | str | None,
    say: Say,
    held_out: float = 0.2,
    cache: Path = CACHE,
    environ: Mapping[str, str] = os.environ,
    generated: bool = False,
    damaged: str = REFUSE,
) -> DataSet:
    """Return the first data of: `folder`, `BEELINE_DATA`, the downloaded set, a generated set.

    The first two may be the address of a zip file.

    `say` takes lines that name the source and the files that are left out. `held_out` is the share of a single image
    folder that becomes the validation pictures. With `generated` no other set is looked for. `damaged` is as in `read`.
    Raise `DataError` for a folder that cannot be trained on, `DownloadError` for a download that started and failed.
    """
    named = str(folder or environ.get(VARIABLE) or "")
    if generated:
        say(f"{_GENERATED}, as asked for")
    elif named.startswith(("http://", "https://")):
        unpacked = pictures(named, cache, say, environ)
        data = read(unpacked, held_out, unpacked.name.rpartition("-")[0], f"downloaded from {named}", damaged, say)
    elif named:
        data = read(Path(named).expanduser(), held_out, None, f"the folder {named}", damaged, say)
    else:
        try:
            data = read(hymenoptera(cache, say, environ), held_out, NAME, "the downloaded set")
        except Unavailable as error:
            generated = True
            say(f"no pictures to download: {error}")
            say(f"{_GENERATED}; set {VARIABLE} to a folder of your own")
    if generated:
        data = read(generate(cache), held_out, "generated circles and stripes", "drawn on this machine")
        data = replace(data, generated=True)
    say(
        f"data: {data.name}, {data.source}; {len(data.train)} training and {len(data.val)} validation pictures "
        f"of {len(data.labels)} classes ({data.split})"
    )
    for note in data.notes:
        say(f"data: {note}")
    _say_skipped((*data.train.skipped, *data.val.skipped), say)
    train = {picture.sha256: picture.path for picture in data.train.pictures}
    if twice := [each for each in data.val.pictures if each.sha256 in train]:
        what = f"{len(twice)} of {len(data.val)} validation pictures are training pictures too, byte for byte"
        say(f"data: {what}, so the accuracy is too high; one is {twice[0].path}, as {train[twice[0].sha256]}")
    return data


def read(
    folder: Path,
    held_out: float = 0.2,
    name: str | None = None,
    source: str = "",
    damaged: str = REFUSE,
    say: Say = silent,
) -> DataSet:
    """Read a folder with `train/` and `val/` or `test/` in any spelling, or one with a folder a class, which is split.

    `say` gets a line for each picture that cannot be read; with `damaged` as `leave_out` the others are taken. Raise
    `DataError` for a folder that is missing or not of classes, for halves that do not fit together, for one class only,
    an empty class, a class that only one half has, or a damaged picture. A `.csv` file is read by `train.table`.
    """
    if _is_table(folder):
        from train.table import read_table

        return read_table(folder, held_out, name, source, damaged, say)
    root, halves, notes = _find(folder)
    name = name or root.resolve().name
    first, second = halves.get("train") if halves else root, halves.get("val") or halves.get("test")
    if first is None:
        raise DataError(
            f"{root} has {second and second.name}/ but no train/; add it, or put all classes into one folder"
        )
    if second is None:
        everything = whole([_pictures(first, root, say)], damaged, say)[0]
        return DataSet(
            name, source, *split(everything, held_out), f"{held_out:.0%} of each class held out", notes=notes
        )
    train, val = whole([_pictures(half, root, say) for half in (first, second)], damaged, say)
    if odd := sorted(set(train.labels) ^ set(val.labels)):
        are = f"the class {odd[0]!r}" if len(odd) == 1 else f"the classes {listed(odd, 10)}"
        raise DataError(f"{root} has {are} in only one of {first.name}/ and {second.name}/; give both the same folders")
    return DataSet(name, source, train, val, f"the folders {first.name}/ and {second.name}/", notes=notes)


def labelled_pictures(folder: Path, say: Say = silent) -> LabelledPictures:
    """Return the pictures to evaluate on: of `val/`, else `test/`, else `train/`, else of every class folder.

    A picture that cannot be read stays, since the classifier refuses it. A single class is enough. Of a CSV file these
    are the lines whose split is val, else test, else all.
    """
    if _is_table(folder):
        from train.table import labelled_rows

        return labelled_rows(folder, say)
    root, halves, _ = _find(folder)
    half = next((halves[role] for role in ("val", "test", "train") if role in halves), root)
    found = _pictures(half, root, say, least=1, keep=True)
    _say_skipped(found.skipped, say)
    for line in found.damaged:
        say(f"data: {line}")
    return found


def _is_table(path: Path) -> bool:
    return path.suffix.lower() == ".csv" and not path.is_dir()


def _say_skipped(skipped: tuple[Path, ...], say: Say) -> None:
    if skipped:
        are = "1 file is" if len(skipped) == 1 else f"{len(skipped)} files are"
        say(f"data: {are} hidden or no photographs and left out: {listed(sorted(skipped))}")


def _find(folder: Path) -> tuple[Path, dict[str, Path], tuple[str, ...]]:
    """Return the folder of class folders or halves, which may be inside of others, its halves by role, and notes.

    Raise `DataError` for halves that do not fit together.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "is missing"
        raise DataError(f"the data folder {folder} {what}; name a folder with train/ and val/, or one folder a class")
    while not (halves := _halves(folder)):
        inner = _folders(folder)
        below = [each for each in inner if _halves(each)]
        if len(below) > 1:
            raise DataError(
                f"{folder} has halves in each of {listed(below)}; put all classes into one train/ and one val/"
            )
        if below or (len(inner) == 1 and _folders(inner[0])):
            folder = below[0] if below else inner[0]
            continue
        flat = [each.name for each in inner if _role(each.name)]
        if len(flat) > 1:
            raise DataError(f"{folder} has {' and '.join(flat)}, which hold no class folders; give them one a class")
        return folder, {}, ()
    train, notes = halves.get("train"), []
    taken = {*halves.values(), *(half.parent for half in halves.values())}
    others = [each for each in _folders(folder) if train and each not in taken]
    if train and len(halves) == 1:
        classes = {each.name.lower() for each in _folders(train)}
        for other in others:
            if classes & {each.name.lower() for each in _folders(other)}:
                raise DataError(f"{folder} has {train.name}/ and {other.name}/ with the same classes; call one val")
    if train and "test" in halves:
        test, left = halves["test"].name, "is not used in training: measure on it with `beeline evaluate RUN --data`"
        notes.append(f"{test}/ {left}" if "val" in halves else f"there is no val/, so {test}/ is the validation half")
    notes += [f"{other.name}/ is neither half and not used" for other in others]
    return folder, halves, tuple(notes)


def _halves(root: Path) -> dict[str, Path]:
    """Return the halves in a folder by role: `train`, `val`, `test`. A folder without class folders is no half."""
    halves: dict[str, Path] = {}
    for half in _folders(root):
        if (role := _role(half.name)) and (inner := _folders(half)):
            if role in halves:
                raise DataError(f"{root} has both {halves[role].name}/ and {half.name}/; move one of them elsewhere")
            # Some archives have a folder twice, as seg_train/seg_train.
            halves[role] = inner[0] if len(inner) == 1 and _role(inner[0].name) == role else half
    return halves


def _role(name: str) -> str | None:
    """Return which half a folder's name means, as `test` for `Test_Images`; None for none."""
    words = {word.removesuffix("set") for word in re.findall("[a-z]+", name.lower())} - _WITH - {""}
    return next((role for role, names in _HALVES.items() if len(words) == 1 and words <= {*names.split()}), None)


def _folders(root: Path) -> list[Path]:
    with os.scandir(root) as entries:
        return sorted(Path(each.path) for each in entries if each.is_dir() and not is_hidden(each.name))


def _pictures(root: Path, of: Path, say: Say, least: int = 2, keep: bool = False) -> LabelledPictures:
    """Return the pictures of the class folders in `root`, by name or first bytes; `keep` takes the damaged ones too.

    `of` is the folder of the whole set, which has the index.
    """
    classes = _folders(root)
    if len(classes) < least:
        lacks = f"only the class folder {classes[0].name!r}" if classes else "no class folders"
        raise DataError(f"{root} has {lacks}; a classifier needs one folder of pictures for each of its classes")
    files = [(truth, *each) for truth, folder in enumerate(classes) for each in walk(folder)]
    facts = examine(of, [path for _, path, why in files if not why], say)
    top = sorted(set(root.iterdir()) - set(classes))
    pictures, skipped = [], [path for path in top if path.exists()]
    damaged = [f"{path}: it leads to no folder" for path in top if not path.exists()]
    for truth, path, why in files:
        fact = facts.get(path, Fact("", "", why))
        named = path.suffix.lower() in SUFFIXES
        # The two letters by which a BMP begins may begin a text.
        announced = fact.kind and not (fact.kind == "BMP" and fact.fault)
        if why in (HIDDEN, CIRCLE) or fact.kind == "GIF" or not (named or announced):
            skipped.append(path)
        elif fact.fault and not keep:
            damaged.append(f"{path}: {fact.fault}")
        else:
            pictures.append(Picture(path, truth, fact.sha256))
    return LabelledPictures(root, tuple(path.name for path in classes), tuple(pictures), tuple(skipped), tuple(damaged))


def whole(halves: list[LabelledPictures], mode: str, say: Say) -> list[LabelledPictures]:
    """Say all that is damaged, and refuse it unless `mode` is `leave_out`; each class must have pictures left."""
    damaged = [line for half in halves for line in half.damaged]
    for line in damaged[:_MOST_LINES]:
        say(f"data: cannot be read: {line}")
    if damaged:
        are = "1 picture" if len(damaged) == 1 else f"{len(damaged)} pictures"
        if mode == REFUSE:
            first = f"{are} cannot be read, such as {damaged[0]}"
            raise DataError(f"{first}; repair or remove them, or leave them out with data.damaged={LEAVE_OUT}")
        say(f"data: {are} that cannot be read left out, as asked for")
    empty = [half.root / label for half in halves for label, count in half.counts().items() if not count]
    if empty:
        them = "folder" if len(empty) == 1 else "folders"
        lack = f"the class {them} {listed(empty, 10)} {'has' if len(empty) == 1 else 'have'} no pictures"
        raise DataError(f"{lack} ({', '.join(SUFFIXES)}); add some, or remove the {them}")
    return halves


def split(whole: LabelledPictures, held_out: float) -> tuple[LabelledPictures, LabelledPictures]:
    """Hold out a share of each class, chosen by the digests of paths, so that every machine chooses the same."""

    def rank(picture: Picture) -> bytes:
        return hashlib.sha256(str(picture.path.relative_to(whole.root)).encode()).digest()

    held: set[Picture] = set()
    if single := [label for label, count in whole.counts().items() if count < 2]:
        are = f"the class {single[0]!r} has" if len(single) == 1 else f"the classes {listed(single, 10)} have"
        raise DataError(f"{are} one picture only; training and validation need one each")
    for truth in range(len(whole.labels)):
        members = sorted((picture for picture in whole.pictures if picture.truth == truth), key=rank)
        held.update(members[: min(max(1, round(held_out * len(members))), len(members) - 1)])
    train = tuple(picture for picture in whole.pictures if picture not in held)
    val = tuple(picture for picture in whole.pictures if picture in held)
    return replace(whole, pictures=train), replace(whole, pictures=val, skipped=())
