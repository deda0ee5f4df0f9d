"""Labelled picture folders: find one, read it, split it, and name the files that are no pictures."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from beeline import pixels
from beeline.errors import RequestError
from host import ROOT, Say
from host.files import sha256
from train.download import NAME, hymenoptera
from train.errors import DataError, Unavailable
from train.generate import LABELS as GENERATED_LABELS
from train.generate import generate

CACHE = ROOT / ".beeline" / "data"
VARIABLE = "BEELINE_DATA"

# The suffix makes a file a picture. GIF is left out, as in torchvision's ImageFolder: such files are drawings,
# animations and "image not found" signs. The worker accepts them.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff")
_TRAIN, _VAL = ("train", "training"), ("val", "valid", "validation")
_NAMED = 3
_GENERATED = f"using GENERATED pictures of {' and '.join(GENERATED_LABELS)} (a drawn set, no photographs)"


@dataclass(frozen=True)
class Picture:
    """One file and the index of its label."""

    path: Path
    truth: int


@dataclass(frozen=True)
class LabelledPictures:
    """Pictures under `root`, one folder a class; labels are the folders' names, sorted."""

    root: Path
    labels: tuple[str, ...]
    pictures: tuple[Picture, ...]
    skipped: tuple[Path, ...] = ()

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
        with ThreadPoolExecutor() as pool:
            lines = pool.map(self._line, self.pictures)
            return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()

    def _line(self, picture: Picture) -> str:
        return f"{sha256(picture.path)}  {picture.path.relative_to(self.root).as_posix()}\n"


@dataclass(frozen=True)
class DataSet:
    """Training and validation pictures.

    `name` is its name in reports; `source` says where it came from, and `split` how the two halves were separated.
    """

    name: str
    source: str
    train: LabelledPictures
    val: LabelledPictures
    split: str
    generated: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        """The class names, in the order of the model's outputs."""
        return self.train.labels

    @property
    def digest(self) -> str:
        """The sha256 over both halves and the split."""
        return hashlib.sha256(f"{self.train.digest}{self.val.digest}{self.split}".encode()).hexdigest()


def find_data(
    folder: Path | None,
    say: Say,
    held_out: float = 0.2,
    cache: Path = CACHE,
    environ: Mapping[str, str] = os.environ,
    generated: bool = False,
) -> DataSet:
    """Return the first data of: `folder`, `BEELINE_DATA`, the downloaded set, a generated set.

    `say` takes lines that name the source and the files that are left out. `held_out` is the share of a single image
    folder that becomes the validation pictures. With `generated` no other set is looked for. Raise `DataError` for a
    folder that cannot be trained on, `DownloadError` for a download that started and failed.
    """
    named = folder or (Path(environ[VARIABLE]) if environ.get(VARIABLE) else None)
    if generated:
        say(f"{_GENERATED}, as asked for")
    elif named is not None:
        data = read(named, held_out, source=f"the folder {named}")
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
    if skipped := sorted({*data.train.skipped, *data.val.skipped}):
        them = "file is" if len(skipped) == 1 else "files are"
        more = f" and {len(skipped) - _NAMED} more" if len(skipped) > _NAMED else ""
        names = ", ".join(map(str, skipped[:_NAMED]))
        say(f"data: {len(skipped)} {them} no photograph by name and left out: {names}{more}")
    return data


def read(folder: Path, held_out: float = 0.2, name: str | None = None, source: str = "") -> DataSet:
    """Read a folder with `train/` and `val/`, or one with a folder a class, which is split.

    Raise `DataError` for a folder that is missing or not of classes, for one class only, an empty class, a class that
    only one half has, or a picture that cannot be read. A `.csv` file is read by `train.table`.
    """
    if folder.suffix.lower() == ".csv" and not folder.is_dir():
        from train.table import read_table

        return read_table(folder, held_out, name, source)
    root = _root(folder)
    train, val = _child(root, _TRAIN), _child(root, _VAL)
    name = name or root.resolve().name
    if train and val:
        first, second = readable(_pictures(train)), readable(_pictures(val))
        if first.labels != second.labels:
            odd = sorted(set(first.labels) ^ set(second.labels))
            what = f"the class {odd[0]!r} in only one of {train.name}/ and {val.name}/"
            raise DataError(f"{root} has {what}; give both the same class folders")
        return DataSet(name, source, first, second, f"the folders {train.name}/ and {val.name}/")
    if val:
        raise DataError(f"{root} has {val.name}/ but no train/; add it, or name a folder with one folder a class")
    whole = readable(_pictures(train or root))
    return DataSet(name, source, *split(whole, held_out), f"{held_out:.0%} of each class held out")


def labelled_pictures(folder: Path) -> LabelledPictures:
    """Return the pictures to evaluate on: those of `val/` where there is one, else of every class folder.

    A picture that cannot be read stays, since the classifier refuses it. A single class is enough.
    """
    root = _root(folder)
    return _pictures(_child(root, _VAL) or root, least=1)


def _root(folder: Path) -> Path:
    """Return the folder that holds the classes or halves; it may be inside a single outer folder."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "is missing"
        raise DataError(f"the data folder {folder} {what}; name a folder with train/ and val/, or one folder a class")
    inner = _folders(folder)
    if len(inner) == 1 and not _child(folder, _TRAIN + _VAL) and len(_folders(inner[0])) >= 2:
        return inner[0]
    return folder


def _child(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _pictures(root: Path, least: int = 2) -> LabelledPictures:
    classes = _folders(root)
    if len(classes) < least:
        found = f"only the class folder {classes[0].name!r}" if classes else "no class folders"
        raise DataError(f"{root} has {found}; a classifier needs one folder of pictures for each of its classes")
    pictures, skipped = [], [path for path in sorted(root.iterdir()) if path.is_file()]
    for truth, folder in enumerate(classes):
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        good = [path for path in files if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
        if not good:
            lacks = f"has no pictures ({', '.join(SUFFIXES)})"
            raise DataError(f"the class folder {folder} {lacks}; add some, or remove the folder")
        pictures += [Picture(path, truth) for path in good]
        skipped += sorted(set(files) - set(good))
    return LabelledPictures(root, tuple(path.name for path in classes), tuple(pictures), tuple(skipped))


def readable(found: LabelledPictures) -> LabelledPictures:
    """Check every picture's header before a long training; only decoding finds broken pixels."""

    def judge(picture: Picture) -> str | None:
        try:
            pixels.probe(picture.path.read_bytes())
        except RequestError as error:
            return f"{picture.path}: {error}"
        except OSError as error:
            return f"{picture.path}: {error.strerror}"
        return None

    with ThreadPoolExecutor() as pool:
        broken = [text for text in pool.map(judge, found.pictures) if text]
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise DataError(f"a picture cannot be read{more}: {broken[0]}; repair it or take it out of the folder")
    return found


def split(whole: LabelledPictures, held_out: float) -> tuple[LabelledPictures, LabelledPictures]:
    """Hold out a share of each class, chosen by the digests of paths, so that every machine chooses the same."""

    def rank(picture: Picture) -> bytes:
        return hashlib.sha256(str(picture.path.relative_to(whole.root)).encode()).digest()

    held: set[Picture] = set()
    for truth, label in enumerate(whole.labels):
        members = sorted((picture for picture in whole.pictures if picture.truth == truth), key=rank)
        if len(members) < 2:
            raise DataError(f"the class {label!r} has one picture only; training and validation need one each")
        held.update(members[: min(max(1, round(held_out * len(members))), len(members) - 1)])
    train = tuple(picture for picture in whole.pictures if picture not in held)
    val = tuple(picture for picture in whole.pictures if picture in held)
    return replace(whole, pictures=train), replace(whole, pictures=val, skipped=())
