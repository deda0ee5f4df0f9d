"""The one store: a folder of archives with index.json: each archive's sha256 as it was built, each model's default.

Every function here raises `ArchiveError` for an index that cannot be read.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
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
# TorchServe separates the archives in its list with commas and stops at a space.
_FILE_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Entry:
    """One archive in the index.

    `measured` is for an engine that was chosen automatically: by engine and precision the milliseconds a picture, or
    the reason for a refusal. The archive does not hold it, because times would change its bytes. `default` says whether
    a request that names no version gets this one. `origin` is the sha256 over what an archive without options was made
    of.
    """

    sha256: str
    name: str
    version: str
    fingerprint: str
    bytes: int
    measured: dict[str, float | str] | None = None
    default: bool = True
    origin: str | None = None


@dataclass(frozen=True)
class Listed:
    """One archive of the store with its state, `ok`, `changed`, `missing` or `unlisted`, and the reason."""

    file: str
    state: str
    reason: str
    entry: Entry | None


def find_archives(
    store: Path, wanted: Sequence[str] = (), listed: bool = False, trusted: str = ""
) -> tuple[Archive, ...]:
    """Return the archives named by `wanted`, or all in `store`; `default` is as in the index of each's folder.

    `wanted` are file names in the store, with or without `.mar`, or paths of `.mar` files anywhere. With `listed` the
    index must hold the sha256 of each, and with the key `trusted` each must be signed by it. Raise `ArchiveError` for
    an empty store; for an archive that is missing, unreadable, not as the index or its own checksums say, not listed or
    not signed; for two of the same model and version.
    """
    paths = list(dict.fromkeys(_path(store, name) for name in wanted)) if wanted else _files(store)
    if not paths:
        raise ArchiveError(f"{store} holds no archive; build one with `beeline archive build`, or name another --store")
    for path in paths:
        if not _FILE_NAME.fullmatch(path.name):
            raise ArchiveError(f"{path} cannot be served under that name; use only letters, digits, '.', '_' and '-'")
    archives = tuple(replace(mar.read(path), default=_entry(path).get("default", True)) for path in paths)
    seen: dict[tuple[str, str], Path] = {}
    for each in archives:
        _check(each.path, listed)
        if trusted:
            check_signature(each.path, trusted)
        other = seen.setdefault((each.model, each.version), each.path)
        if other != each.path:
            raise ArchiveError(f"{other} and {each.path} are both {each.model} {each.version}; name one with --model")
    return archives


def sign(path: Path, key: Path) -> Path:
    """Write the signature of an archive beside it, as minisign does, and return its path `<archive>.minisig`.

    `key` is a file of minisign's secret key without a password. Raise `ArchiveError` for another file.
    """
    signature = path.with_name(f"{path.name}.minisig")
    try:
        with path.open("rb") as file:
            secret = _minisign().SecretKey.from_file(key)
            signature.write_bytes(bytes(secret.sign(file, trusted_comment=f"file:{path.name}")))
    except (OSError, ValueError) as error:
        fix = "make one with `minisign -G -W`, or name another"
        raise ArchiveError(f"{path} cannot be signed with the key {key} ({error}); {fix}") from error
    return signature


def check_signature(path: Path, trusted: str) -> None:
    """Raise `ArchiveError` unless the key signed these bytes; `trusted` is minisign's public key, or a file of it."""
    keys = _minisign().PublicKey
    try:
        (keys.from_file(trusted) if Path(trusted).is_file() else keys.from_base64(trusted)).verify_file(path)
    except (OSError, ValueError) as error:
        fix = "sign it with `beeline archive sign`, or name the key of who signed it"
        raise ArchiveError(f"{path} is not signed by the trusted key {trusted} ({error}); {fix}") from error


def _minisign() -> Any:
    """Import minisign, which no process needs but those that sign or check."""
    try:
        return importlib.import_module("minisign")
    except ImportError as error:
        raise ArchiveError(
            "signatures need the package py-minisign, which the images lack; `make setup` installs it"
        ) from error


def locate(given: Path, store: Path = STORE) -> Path:
    """Return the path of an archive given by its path, or by its name in the store; it need not exist."""
    named = store / _file(given.name)
    return named if not given.exists() and len(given.parts) == 1 and named.exists() else given


def names(archives: Iterable[Archive]) -> tuple[str, ...]:
    """Return the models' names, each once, in order."""
    return tuple(dict.fromkeys(archive.model for archive in archives))


def read_index(store: Path) -> dict[str, Entry]:
    """Return the index by file name; an empty one if the file is missing."""
    try:
        return {file: Entry(**entry) for file, entry in _entries(store).items()}
    except TypeError as error:
        raise _unreadable(store, error) from error


def expected_sha256(path: Path) -> str | None:
    """Return the sha256 of an archive in the index of its folder, None if the index does not list it."""
    expected: str | None = _entry(path).get("sha256")
    return expected


def changed(path: Path) -> str | None:
    """Return how an archive differs from the index; None if it does not, or is not listed."""
    expected = expected_sha256(path)
    if expected is None or (actual := sha256(path)) == expected:
        return None
    digests = f"has sha256 {actual[:SHORT]}, {INDEX} says {str(expected)[:SHORT]}"
    return f"{digests}; it was changed after it was built: build it again with `beeline archive build`"


def put(store: Path, draft: Path, entry: Entry, default: bool = False) -> Path:
    """Move a finished archive into the store, list it, and return its path. Several processes may do so at once.

    A model's first version is its default, until another one is put with `default`.
    """
    with locked(store / ".lock"):
        index, file = read_index(store), file_of(store, entry.name, entry.version)
        others = {name: one for name, one in index.items() if one.name == entry.name and name != file}
        if default:
            index |= {name: replace(one, default=False) for name, one in others.items()}
        index[file] = replace(entry, default=default or not any(one.default for one in others.values()))
        draft.chmod(0o644)
        draft.replace(store / file)
        archives = {name: asdict(index[name]) for name in sorted(index)}
        write_json(store / INDEX, {"schema": _SCHEMA, "archives": archives}, mode=0o644)
    return store / file


def file_of(store: Path, name: str, version: str) -> str:
    """Return the file name of a version, which no other version has: `NAME.mar` if that is free, else with the version.

    Raise `ArchiveError` if another model has both.
    """
    index = read_index(store)
    own = [file for file, entry in index.items() if (entry.name, entry.version) == (name, version)]
    for file in (*own, f"{name}.mar", f"{name}-{version}.mar"):
        holders = {(entry.name, entry.version) for entry in [index.get(file)] if entry is not None}
        # A file that is no archive may be overwritten.
        with suppress(ArchiveError):
            there = mar.read(store / file)
            holders.add((there.model, there.version))
        if holders <= {(name, version)}:
            return file
    other = " ".join(min(holders - {(name, version)}))
    raise ArchiveError(f"{store / file} is {other}; give {name} {version} another --name, or name another --store")


def listing(store: Path) -> list[Listed]:
    """Compare the index with the archives in the folder, by name; raise `ArchiveError` for a missing folder."""
    if not store.is_dir():
        raise ArchiveError(f"the store {store} is missing; build an archive, or name another --store")
    index = read_index(store)
    files = {path.name for path in store.glob("*.mar")}
    archives = []
    for name in sorted(files | set(index)):
        if name not in index:
            state, reason = "unlisted", "the index does not list it; `beeline archive verify` checks it"
        elif name not in files:
            state, reason = "missing", "the index lists it but the file is gone; build it again"
        elif difference := changed(store / name):
            state, reason = "changed", difference
        else:
            state, reason = "ok", "as it was built"
        archives.append(Listed(name, state, reason, index.get(name)))
    return archives


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


def _entry(path: Path) -> dict[str, Any]:
    return _entries(path.parent).get(path.name, {})


def _files(store: Path) -> list[Path]:
    """Return the archives in a folder; a model's first version comes before its others."""
    return sorted(store.glob("*.mar"), key=lambda path: path.stem)


def _unreadable(store: Path, error: Exception) -> ArchiveError:
    return ArchiveError(f"{store / INDEX} cannot be read ({error}); remove it and build its archives again")


def _file(name: str) -> str:
    return name if name.endswith(".mar") else f"{name}.mar"


def _path(store: Path, name: str) -> Path:
    """Return the path of an archive given by its name in the store, or by a path that ends in `.mar`."""
    name = name.rstrip("/")
    elsewhere = name.endswith(".mar") and "/" in name
    path = Path(name).resolve() if elsewhere else store / _file(name)
    if path.is_file():
        return path
    known = [] if elsewhere else [entry.stem for entry in store.glob("*.mar")]
    hint = did_you_mean(path.stem, known) if known else "; build it with `beeline archive build`"
    raise ArchiveError(f"{path} is missing{hint}")


def _check(path: Path, listed: bool) -> None:
    """Compare an archive with the index in its folder or, if that does not list it, with its own checksums."""
    if reason := changed(path):
        raise ArchiveError(f"{path} {reason}")
    if expected_sha256(path) is not None:
        return
    if listed:
        why = f"is not in the {INDEX} of its folder, and only archives that it lists with their sha256 are served here"
        raise ArchiveError(f"{path} {why}; build it into this store with `beeline archive build`")
    mar.check_record(path)
