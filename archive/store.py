"""The one store: a folder of archives, and index.json, which says what each was when it was built."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from archive import mar
from archive.mar import Archive
from beeline.errors import ArchiveError, did_you_mean
from host import ROOT
from host.files import SHORT, locked, sha256, write_json

STORE = ROOT / "model_store"
INDEX = "index.json"
_SCHEMA = 1
# TorchServe takes a list of archives that are separated by commas and end at a space.
_FILE_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Entry:
    """What the index says of one archive.

    Where engines and precisions were compared to choose one, `measured` holds the milliseconds a picture of each, or
    why it was refused. It is not in the archive, since times would change its bytes.
    """

    sha256: str
    name: str
    version: str
    fingerprint: str
    bytes: int
    measured: dict[str, float | str] | None = None


@dataclass(frozen=True)
class Listed:
    """One archive of the store with its state, `ok`, `changed`, `missing` or `unlisted`, and the reason."""

    file: str
    state: str
    reason: str
    entry: Entry | None


def find_archives(store: Path, wanted: Sequence[str] = (), listed: bool = False) -> tuple[Archive, ...]:
    """Return the archives named by `wanted`, else every one in `store`.

    Args:
        store: a folder of `.mar` files, with or without an `index.json`.
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
            raise ArchiveError(f"{path} cannot be served under that name; use only letters, digits, '.', '_' and '-'")
    archives = tuple(mar.read(path) for path in paths)
    seen: dict[tuple[str, str], Path] = {}
    for archive in archives:
        _check(archive.path, listed)
        key = (archive.model, archive.version)
        if key in seen:
            raise ArchiveError(
                f"{seen[key]} and {archive.path} are both {archive.model} {archive.version}; name one with --model"
            )
        seen[key] = archive.path
    return archives


def locate(given: Path, store: Path = STORE) -> Path:
    """Return the path of an archive given by its path, or by its name in the store; it need not exist."""
    named = store / (given.name if given.suffix == ".mar" else f"{given.name}.mar")
    return named if not given.exists() and len(given.parts) == 1 and named.exists() else given


def names(archives: Iterable[Archive]) -> tuple[str, ...]:
    """Return the models' names, each once, in order."""
    return tuple(dict.fromkeys(archive.model for archive in archives))


def read_index(store: Path) -> dict[str, Entry]:
    """Return the index by file name; empty where there is none.

    Raises:
        ArchiveError: when it cannot be read.
    """
    try:
        return {file: Entry(**entry) for file, entry in _entries(store).items()}
    except TypeError as error:
        raise _unreadable(store, error) from error


def expected_sha256(path: Path) -> str | None:
    """Return the sha256 of an archive in the index of its folder; None when it is not listed.

    Raises:
        ArchiveError: when the index cannot be read.
    """
    expected: str | None = _entries(path.parent).get(path.name, {}).get("sha256")
    return expected


def changed(path: Path) -> str | None:
    """Return why an archive is not the one that the index lists, None where it is, or is not listed.

    Raises:
        ArchiveError: when the index cannot be read.
    """
    expected = expected_sha256(path)
    if expected is None or (actual := sha256(path)) == expected:
        return None
    return (
        f"has sha256 {actual[:SHORT]}, {INDEX} says {str(expected)[:SHORT]}; it was changed after it was built: build "
        "it again with `beeline archive build`"
    )


def put(store: Path, draft: Path, file: str, entry: Entry) -> None:
    """Move a finished archive into the store under its name and list it; builds may run at the same time.

    Raises:
        ArchiveError: when the index cannot be read.
    """
    with locked(store / ".lock"):
        index = {**read_index(store), file: entry}
        draft.chmod(0o644)
        draft.replace(store / file)
        archives = {name: asdict(index[name]) for name in sorted(index)}
        write_json(store / INDEX, {"schema": _SCHEMA, "archives": archives}, mode=0o644)


def listing(store: Path) -> list[Listed]:
    """Compare the index with the folder, archive by archive, by name.

    Raises:
        ArchiveError: when the folder or the index cannot be read.
    """
    if not store.is_dir():
        raise ArchiveError(f"the store {store} is missing; build an archive, or name another --store")
    index = read_index(store)
    files = {path.name for path in store.glob("*.mar")}
    found = []
    for name in sorted(files | set(index)):
        if name not in index:
            state, reason = "unlisted", "the index does not list it; `beeline archive verify` checks it"
        elif name not in files:
            state, reason = "missing", "the index lists it but the file is gone; build it again"
        elif difference := changed(store / name):
            state, reason = "changed", difference
        else:
            state, reason = "ok", "as it was built"
        found.append(Listed(name, state, reason, index.get(name)))
    return found


def _entries(store: Path) -> dict[str, dict[str, Any]]:
    try:
        values = json.loads((store / INDEX).read_text(encoding="utf-8"))
        if values["schema"] != _SCHEMA:
            raise ValueError(f"schema {values['schema']!r}, this version reads {_SCHEMA}")
        return {str(file): dict(entry) for file, entry in values["archives"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(store, error) from error


def _unreadable(store: Path, error: Exception) -> ArchiveError:
    return ArchiveError(f"{store / INDEX} cannot be read ({error}); remove it and build its archives again")


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


def _check(path: Path, listed: bool) -> None:
    """Compare an archive with the index in its folder, or, where that does not list it, with its own record."""
    if reason := changed(path):
        raise ArchiveError(f"{path} {reason}")
    if expected_sha256(path) is not None:
        return
    if listed:
        raise ArchiveError(
            f"{path} is not in the {INDEX} of its folder, and only archives that it lists with their sha256 are served "
            "here; build it into this store with `beeline archive build`"
        )
    mar.check_record(path)
