"""The one reader of `.mar` files: the model's name and version, the checksums of all files, and the files themselves.

`read` accepts any archive, like a server. `check`, `opened` and `unpack` refuse unsafe ones. No code of an archive is
run. Every error is an `ArchiveError` that names the first thing that is wrong.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beeline.errors import ArchiveError, SpecError
from beeline.spec import CHECKSUMS, EXPECTED, FILE_NAME, GOLDEN, ModelSpec
from host import zips
from host.files import SHORT

MANIFEST = "MAR-INF/MANIFEST.json"
CONFIG_FILE = "model-config.yaml"
HANDLER = "vision_handler.py"
# A spec of schema 1 holds the digest of this file.
_GEOMETRY_CODE = "beeline/pixels.py"
# Deflate reaches 1032 to 1 on zeros; weights, code and pictures stay below 10 to 1.
RULES = zips.Rules(ArchiveError, "copy or build it again", 2_000, 4 << 30, 100, plain=True)
# What a damaged archive, or JSON of another shape, raises when it is read.
_BROKEN = (*zips.BROKEN, KeyError, TypeError, IndexError, AttributeError)


@dataclass(frozen=True)
class Golden:
    """A golden picture: its file in the archive, and the first label of the expected answer."""

    file: str
    label: str


@dataclass(frozen=True)
class Archive:
    """One `.mar` with its model's name and version. Without golden pictures, it was not built by Beeline.

    `handler` is its file, or one of TorchServe's names; `requirements` its list of packages, empty if there is none.
    `engine` is what runs it, empty if no spec says so; `unpacked` the bytes of all its files.
    `default` is for `archive.store`, whose index says whether this is the model's default version.
    """

    path: Path
    model: str
    version: str
    goldens: tuple[Golden, ...] = ()
    handler: str = ""
    requirements: str = ""
    engine: str = ""
    unpacked: int = 0
    default: bool = True

    @property
    def golden(self) -> Golden | None:
        """The first golden picture."""
        return self.goldens[0] if self.goldens else None

    def golden_bytes(self, golden: Golden | None = None) -> bytes:
        """Return the bytes of a golden picture, by default of the first one."""
        golden = golden or self.golden
        if golden is None:
            raise ArchiveError(f"{self.path} has no golden picture; build it with `beeline archive build`")
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(golden.file)
        except _BROKEN as error:
            raise ArchiveError(f"{self.path} no longer holds {golden.file} ({error}); build it again") from error


@dataclass(frozen=True)
class Contents:
    """What an archive holds. `sizes` (bytes) and `digests` (sha256) are by file name."""

    spec: ModelSpec
    handler: str
    pictures: tuple[dict[str, Any], ...]
    detects: tuple[str, ...]
    sizes: dict[str, int]
    digests: dict[str, str]


def read(path: Path) -> Archive:
    """Read the model's name and version and the golden pictures of any archive, whoever built it."""
    listing = f"{GOLDEN}/{EXPECTED}"
    try:
        with zipfile.ZipFile(path) as archive:
            model = json.loads(archive.read(MANIFEST))["model"]
            sizes = {info.filename: info.file_size for info in archive.infolist()}
            pictures = json.loads(archive.read(listing))["pictures"] if listing in sizes else ()
            engine = str(json.loads(archive.read(FILE_NAME)).get("engine", "")) if FILE_NAME in sizes else ""
        goldens = tuple(Golden(f"{GOLDEN}/{picture['file']}", str(picture["top"][0][0])) for picture in pictures)
        handler, requirements = (str(model.get(key, "")) for key in ("handler", "requirementsFile"))
        version = str(model.get("modelVersion", "1.0"))
        name, size = str(model["modelName"]), sum(sizes.values())
        return Archive(path, name, version, goldens, handler, requirements, engine, size)
    except _BROKEN as error:
        raise ArchiveError(
            f"{path} cannot be read as a model archive ({type(error).__name__}: {error}); build it again"
        ) from error


def check_record(path: Path) -> None:
    """Compare the files of an archive with its checksums, before a server can import them.

    A worker makes the same check, but by then Python has already looked for torch and numpy in the archive's folder.
    An archive without checksums was not built by Beeline and is served unchecked.
    """
    with zipfile.ZipFile(path) as archive:
        names = {info.filename for info in archive.infolist() if not info.is_dir()}
        if CHECKSUMS not in names:
            return
        try:
            _check_files(archive, path, _json(archive, CHECKSUMS, path), names)
        except _BROKEN as error:
            raise ArchiveError(f"{path} cannot be checked ({type(error).__name__}: {error}); build it again") from error


def check(mar: Path) -> Contents:
    """Compare every file of an archive with its checksums, and the spec and the manifest with the files."""
    with opened(mar) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        record = _json(archive, CHECKSUMS, mar)
        try:
            spec = ModelSpec.from_dict(_json(archive, FILE_NAME, mar))
        except SpecError as error:
            raise ArchiveError(f"{mar}: {FILE_NAME}: {error}") from error
        digests = _check_files(archive, mar, record, set(sizes))
        _check_identity(mar, record, spec, digests)
        handler = _check_manifest(mar, _json(archive, MANIFEST, mar), spec, sizes)
        expected = _json(archive, f"{GOLDEN}/{EXPECTED}", mar)
    pictures = expected.get("pictures")
    if not isinstance(pictures, list) or not pictures:
        raise ArchiveError(f"{mar}: {GOLDEN}/{EXPECTED} lists no golden picture; export the model again")
    return Contents(spec, handler, tuple(pictures), tuple(expected.get("detects", ())), sizes, digests)


@contextmanager
def opened(mar: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive for reading, after a check of every name, size and type in it."""
    if not mar.is_file():
        raise ArchiveError(f"the archive {mar} is missing; build it with `beeline archive build`, or name another")
    with zips.opened(mar, RULES) as archive:
        yield archive


def unpack(mar: Path, folder: Path) -> None:
    """Unpack an archive into the empty `folder`, after the checks of `opened`. Nothing outside `folder` is touched."""
    with opened(mar) as archive:
        archive.extractall(folder)


def renamed(mar: Path, model: str, folder: Path) -> Path:
    """Copy an archive into a folder, with another model name; return the new file, `<model>.mar`."""
    target = folder / f"{model}.mar"
    with opened(mar) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename == MANIFEST:
                manifest = json.loads(data)
                manifest["model"]["modelName"] = model
                data = json.dumps(manifest).encode()
            new.writestr(info.filename, data)
    return target


def manifest(spec: ModelSpec, handler: str, has_config: bool) -> dict[str, Any]:
    """Return the manifest as torch-model-archiver 0.12 writes it, except that the date is fixed."""
    model = {
        "modelName": spec.name,
        "modelVersion": spec.version,
        "serializedFile": spec.model.file,
        "handler": handler,
        **({"configFile": CONFIG_FILE} if has_config else {}),
    }
    return {"createdOn": "01/01/1980 00:00:00", "runtime": "python", "model": model, "archiverVersion": "0.12.0"}


def _json(archive: zipfile.ZipFile, name: str, mar: Path) -> dict[str, Any]:
    try:
        values = json.loads(archive.read(name))
    except KeyError as error:
        raise ArchiveError(f"{mar} holds no {name}; build it with `beeline archive build`") from error
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"{mar}: {name} is not JSON ({error}); build it again") from error
    if not isinstance(values, dict):
        raise ArchiveError(f"{mar}: {name} holds a {type(values).__name__}, expected an object; build it again")
    return values


def _check_files(archive: zipfile.ZipFile, mar: Path, record: dict[str, Any], names: set[str]) -> dict[str, str]:
    files = record.get("files")
    if not isinstance(files, dict):
        raise ArchiveError(f"{mar}: {CHECKSUMS} lists no files; build it again")
    covered = names - {CHECKSUMS, MANIFEST}
    for name in sorted(covered | set(files)):
        if name not in files:
            raise ArchiveError(f"{mar} holds {name}, which {CHECKSUMS} does not list; build it again")
        if name not in covered:
            raise ArchiveError(f"{mar} lacks {name}, which {CHECKSUMS} lists; build it again")
        digest = hashlib.sha256()
        with archive.open(name) as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        if digest.hexdigest() != files[name]:
            raise _differs(mar, name, str(files[name]), digest.hexdigest())
    return {str(name): str(value) for name, value in files.items()}


def _check_identity(mar: Path, record: dict[str, Any], spec: ModelSpec, digests: dict[str, str]) -> None:
    """Compare the spec's fingerprint with the record, and the digests that the spec holds with the archive's files."""
    if record.get("fingerprint") != spec.fingerprint():
        raise _differs(mar, "the spec's fingerprint", str(record.get("fingerprint")), spec.fingerprint())
    old = {} if spec.geometry_sha256 is None else {_GEOMETRY_CODE: spec.geometry_sha256}
    for name, expected in {**spec.digests, **old}.items():
        if expected != digests.get(name):
            raise _differs(mar, name, expected, str(digests.get(name)))


def _check_manifest(mar: Path, actual: dict[str, Any], spec: ModelSpec, files: Mapping[str, int]) -> str:
    """Compare every key of the manifest with the spec; return the handler's file. Some keys make a server run pip."""
    model = actual.get("model")
    handler = str(model.get("handler")) if isinstance(model, dict) else ""
    if handler not in files or not handler.endswith(".py"):
        raise ArchiveError(f"{mar}: {MANIFEST} names the handler {handler!r}, which is not there; build it again")
    expected = manifest(spec, handler, CONFIG_FILE in files)
    # The archive may be from another version of the archiver.
    expected["archiverVersion"] = actual.get("archiverVersion")
    for prefix, right, found in (("model.", expected.pop("model"), actual.pop("model")), ("", expected, actual)):
        for key in (*right, *found):
            if right.get(key) != found.get(key):
                name, value = f"{MANIFEST} has {prefix}{key}", found.get(key)
                raise ArchiveError(f"{mar}: {name} {value!r}, expected {right.get(key)!r}; build it again")
    return handler


def _differs(mar: Path, name: str, expected: str, actual: str) -> ArchiveError:
    return ArchiveError(f"{mar}: {name} has sha256 {actual[:SHORT]}, expected {expected[:SHORT]}; build it again")
