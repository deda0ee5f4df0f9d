"""The archives to serve: found in a store, named by their manifests, compared with the index."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beeline.errors import ArchiveError, did_you_mean

MANIFEST = "MAR-INF/MANIFEST.json"
GOLDEN = "golden/expected.json"
RECORD = "checksums.json"
INDEX = "index.json"
# TorchServe separates archives by commas in a value that ends at a space.
_FILE_NAME = re.compile(r"[A-Za-z0-9_.-]+")
# What a file that is no proper archive makes the library raise: bits that fell over, an encrypted member, an
# unknown compression, JSON of another form.
_BROKEN = (
    OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError,
    ValueError, KeyError, TypeError, IndexError, AttributeError,
)  # fmt: skip


@dataclass(frozen=True)
class Canary:
    """A golden picture of an archive and the label that the model must put first for it."""

    file: str
    label: str


@dataclass(frozen=True)
class Archive:
    """One `.mar` and what its manifest calls the model; `canary` is None where it has no golden pictures."""

    path: Path
    model: str
    version: str
    canary: Canary | None

    def canary_bytes(self) -> bytes:
        """Return the canary's picture.

        Raises:
            ArchiveError: when the archive changed since it was read.
        """
        if self.canary is None:
            raise ArchiveError(f"{self.path} has no golden picture to try; build it with `beeline archive build`")
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(self.canary.file)
        except _BROKEN as error:
            raise ArchiveError(f"{self.path} lost {self.canary.file} ({error}); build it again") from error


def find(store: Path, wanted: Sequence[str] = (), listed: bool = False) -> tuple[Archive, ...]:
    """Return the archives named by `wanted`, else every one in `store`.

    Args:
        store: a folder of `.mar` files, with `index.json` beside them or without.
        wanted: each a file name in the store with or without `.mar`, or the path of a `.mar` anywhere.
        listed: whether the index must list each with its sha256.

    Raises:
        ArchiveError: for an empty store, a missing or unreadable archive, one that differs from the index
            or is not in it and must be, or two of the same model and version.
    """
    paths = [_path(store, name) for name in dict.fromkeys(wanted)] if wanted else sorted(store.glob("*.mar"))
    if not paths:
        raise ArchiveError(f"{store} holds no archive; build one with `beeline archive build`, or name another --store")
    for path in paths:
        if not _FILE_NAME.fullmatch(path.name):
            raise ArchiveError(f"{path} cannot be served under that name; use letters, digits, '.', '_' and '-' only")
    archives = tuple(_read(path) for path in paths)
    seen: dict[tuple[str, str], Path] = {}
    for archive in archives:
        _check_index(archive.path, listed)
        key = (archive.model, archive.version)
        if key in seen:
            raise ArchiveError(
                f"{seen[key]} and {archive.path} are both {archive.model} {archive.version}; name one with --model"
            )
        seen[key] = archive.path
    return archives


def sha256(path: Path) -> str:
    """Return a file's digest as the index has it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def names(archives: Iterable[Archive]) -> tuple[str, ...]:
    """Return the models' names, each once, in order."""
    return tuple(dict.fromkeys(archive.model for archive in archives))


def _path(store: Path, name: str) -> Path:
    given = Path(name)
    if given.suffix == ".mar" and len(given.parts) > 1:
        path = given.resolve()
        known: list[str] = []
    else:
        path = store / (name if given.suffix == ".mar" else f"{name}.mar")
        known = [entry.stem for entry in store.glob("*.mar")]
    if path.is_file():
        return path
    hint = did_you_mean(path.stem, known) if known else "; build it with `beeline archive build`"
    raise ArchiveError(f"{path} is missing{hint}")


def _read(path: Path) -> Archive:
    try:
        with zipfile.ZipFile(path) as archive:
            model = json.loads(archive.read(MANIFEST))["model"]
            golden = json.loads(archive.read(GOLDEN)) if GOLDEN in archive.namelist() else None
        canary = _canary(golden)
        return Archive(path, str(model["modelName"]), str(model.get("modelVersion", "1.0")), canary)
    except _BROKEN as error:
        raise ArchiveError(
            f"{path} cannot be read as a model archive ({type(error).__name__}: {error}); build it again"
        ) from error


def _canary(golden: dict[str, Any] | None) -> Canary | None:
    if golden is None:
        return None
    first = golden["pictures"][0]
    return Canary(f"golden/{first['file']}", str(first["top"][0][0]))


def _check_index(path: Path, listed: bool) -> None:
    """Compare with the index beside the archive, or, where that does not list it, with the archive's own record."""
    index = path.parent / INDEX
    if not index.is_file():
        _unlisted(path, listed)
        return
    try:
        expected = json.loads(index.read_text(encoding="utf-8"))["archives"].get(path.name, {}).get("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ArchiveError(f"{index} cannot be read ({error}); build an archive again, which rewrites it") from error
    if expected is None:
        _unlisted(path, listed)
        return
    found = sha256(path)
    if found != expected:
        raise ArchiveError(
            f"{path} has sha256 {found[:12]}, {INDEX} says {str(expected)[:12]}; "
            "it was changed after it was built: build it again with `beeline archive build`"
        )


def _unlisted(path: Path, listed: bool) -> None:
    if listed:
        raise ArchiveError(
            f"{path} is not in the {INDEX} beside it, and only archives that it lists with their sha256 are served "
            "here; build it into this store with `beeline archive build`"
        )
    _check_record(path)


def _check_record(path: Path) -> None:
    """Refuse files that the archive's record does not know, before any server imports them.

    A worker checks the same record, but only after Python has looked for torch and numpy in its folder.
    An archive without a record is somebody else's, and is served as it is.
    """
    with zipfile.ZipFile(path) as archive:
        if RECORD not in archive.namelist():
            return
        try:
            known: dict[str, str] = json.loads(archive.read(RECORD))["files"]
            for info in archive.infolist():
                if info.is_dir() or info.filename in (RECORD, MANIFEST):
                    continue
                if hashlib.sha256(archive.read(info)).hexdigest() != known.get(info.filename):
                    raise ArchiveError(
                        f"{path} holds {info.filename}, which is not as {RECORD} lists it; it was changed since: "
                        "build it again"
                    )
        except _BROKEN as error:
            raise ArchiveError(f"{path} cannot be checked ({type(error).__name__}: {error}); build it again") from error
