"""The store: a folder of archives and index.json, which says what each was when it was built."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from archive.digest import SHORT, file_sha256
from beeline.errors import ArchiveError

STORE = Path(__file__).resolve().parents[1] / "model_store"
INDEX = "index.json"
_SCHEMA = 1


@dataclass(frozen=True)
class Entry:
    """What the index says of one archive.

    `measured` is what each engine and precision took where they were compared to choose one, in milliseconds a
    picture, or why it was refused. It is here and not in the archive, whose bytes depend on the choice alone.
    """

    sha256: str
    name: str
    version: str
    fingerprint: str
    bytes: int
    measured: dict[str, float | str] | None = None


@dataclass(frozen=True)
class Listed:
    """One archive of the store and its state: `ok`, `changed`, `missing` or `unlisted`, with the reason."""

    file: str
    state: str
    reason: str
    entry: Entry | None


def read_index(store: Path) -> dict[str, Entry]:
    """Return the index by file name; empty where there is none.

    Raises:
        ArchiveError: when it cannot be read.
    """
    path = store / INDEX
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["schema"] != _SCHEMA:
            raise ValueError(f"schema {values['schema']!r}, this version reads {_SCHEMA}")
        return {str(file): Entry(**entry) for file, entry in values["archives"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArchiveError(f"{path} cannot be read ({error}); remove it and build its archives again") from error


def expected_sha256(mar: Path) -> str | None:
    """Return what the index beside an archive says of it; None when it is not listed."""
    entry = read_index(mar.parent).get(mar.name)
    return entry.sha256 if entry else None


def put(store: Path, draft: Path, file: str, entry: Entry) -> None:
    """Move a finished archive into the store under its name and list it; builds may run at the same time.

    Raises:
        ArchiveError: when the index cannot be read.
    """
    with _locked(store):
        index = read_index(store)
        index[file] = entry
        draft.chmod(0o644)
        draft.replace(store / file)
        values = {"schema": _SCHEMA, "archives": {name: asdict(index[name]) for name in sorted(index)}}
        _write_whole(store / INDEX, json.dumps(values, indent=2) + "\n")


def listing(store: Path) -> list[Listed]:
    """Compare the index with the folder, archive by archive, by name.

    Raises:
        ArchiveError: when the folder or the index cannot be read.
    """
    if not store.is_dir():
        raise ArchiveError(f"the store {store} is missing; build an archive, or name another --store")
    index = read_index(store)
    files = {path.name for path in store.glob("*.mar")}
    return [_listed(store / name, index.get(name), name in files) for name in sorted(files | set(index))]


def _listed(path: Path, entry: Entry | None, there: bool) -> Listed:
    if entry is None:
        return Listed(
            path.name, "unlisted", "the index does not know it; `beeline archive verify` says what it is", None
        )
    if not there:
        return Listed(path.name, "missing", "the index lists it but the file is gone; build it again", entry)
    actual = file_sha256(path)
    if actual != entry.sha256:
        reason = f"sha256 {actual[:SHORT]}, the index says {entry.sha256[:SHORT]}; build it again"
        return Listed(path.name, "changed", reason, entry)
    return Listed(path.name, "ok", "as it was built", entry)


@contextmanager
def _locked(store: Path) -> Iterator[None]:
    with (store / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write_whole(path: Path, text: str) -> None:
    """Write so that a reader sees the old file or the new one."""
    handle, draft = tempfile.mkstemp(prefix=".index-", suffix=".tmp", dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    Path(draft).chmod(0o644)
    Path(draft).replace(path)
