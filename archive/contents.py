"""An archive's own account of itself, read without running anything of it."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archive import manifest, safety
from archive.digest import SHORT
from beeline.errors import ArchiveError, SpecError
from beeline.spec import CHECKSUMS, EXPECTED, FILE_NAME, GOLDEN, ModelSpec

# What an archive of schema 1 names by its digest in the spec.
GEOMETRY_CODE = "beeline/pixels.py"


@dataclass(frozen=True)
class Contents:
    """What lies in an archive: its spec, handler, golden pictures, and bytes and digest of each file."""

    spec: ModelSpec
    handler: str
    pictures: tuple[dict[str, Any], ...]
    detects: tuple[str, ...]
    sizes: dict[str, int]
    digests: dict[str, str]


def read(mar: Path) -> Contents:
    """Read an archive and compare every file with the archive's record of it.

    Raises:
        ArchiveError: naming the first thing that is unsafe, missing or differs, with both digests.
    """
    with safety.opened(mar) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        record = _json(archive, CHECKSUMS, mar)
        spec = _spec(archive, mar)
        digests = _check_files(archive, mar, record, set(sizes))
        _check_identity(mar, record, spec, digests)
        handler = manifest.check(safety.read(archive, safety.MANIFEST, mar), spec, sizes)
        expected = _json(archive, f"{GOLDEN}/{EXPECTED}", mar)
    pictures = expected.get("pictures")
    if not isinstance(pictures, list) or not pictures:
        raise ArchiveError(f"{mar} lists no golden picture; export the model again")
    return Contents(spec, handler, tuple(pictures), tuple(expected.get("detects", ())), sizes, digests)


def _json(archive: zipfile.ZipFile, name: str, mar: Path) -> dict[str, Any]:
    try:
        values = json.loads(safety.read(archive, name, mar))
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"{mar}: {name} is no JSON ({error}); build it again") from error
    if not isinstance(values, dict):
        raise ArchiveError(f"{mar}: {name} holds a {type(values).__name__}; build it again")
    return values


def _spec(archive: zipfile.ZipFile, mar: Path) -> ModelSpec:
    try:
        return ModelSpec.from_dict(_json(archive, FILE_NAME, mar))
    except SpecError as error:
        raise ArchiveError(f"{mar}: {FILE_NAME}: {error}") from error


def _check_files(archive: zipfile.ZipFile, mar: Path, record: dict[str, Any], names: set[str]) -> dict[str, str]:
    files = record.get("files")
    if not isinstance(files, dict):
        raise ArchiveError(f"{mar}: {CHECKSUMS} lists no files; build it again")
    covered = names - {CHECKSUMS, safety.MANIFEST}
    for name in sorted(covered | set(files)):
        if name not in files:
            raise ArchiveError(
                f"{mar} holds {name}, which {CHECKSUMS} does not list; it was added since: build it again"
            )
        if name not in covered:
            raise ArchiveError(f"{mar} lacks {name}, which {CHECKSUMS} lists; it was removed since: build it again")
        digest = hashlib.sha256()
        with archive.open(name) as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        if digest.hexdigest() != files[name]:
            raise _differs(mar, name, str(files[name]), digest.hexdigest())
    return {str(name): str(value) for name, value in files.items()}


def _check_identity(mar: Path, record: dict[str, Any], spec: ModelSpec, digests: dict[str, str]) -> None:
    """Tie the spec to the record and the model, each by its digest; of schema 1, to the geometry code too."""
    named = dict(spec.model.digests)
    if spec.geometry_sha256 is not None:
        named[GEOMETRY_CODE] = spec.geometry_sha256
    for what, expected, actual in (
        ("the spec's fingerprint", record.get("fingerprint"), spec.fingerprint()),
        *((name, expected, digests.get(name)) for name, expected in named.items()),
    ):
        if expected != actual:
            raise _differs(mar, what, str(expected), str(actual))


def _differs(mar: Path, what: str, expected: str, actual: str) -> ArchiveError:
    return ArchiveError(
        f"{mar}: {what} has sha256 {actual[:SHORT]}, expected {expected[:SHORT]}; it was changed since: build it again"
    )
