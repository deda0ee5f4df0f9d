"""The one reader of a `.mar`: its model's name and version, its record of every file, and its files unpacked.

`read` takes any archive, as a server would; `check` and `unpack` refuse unsafe ones. Nothing of an archive is run here,
and nothing but the standard library is needed.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Collection, Iterator
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
# torch-model-archiver writes the time of the build; ours is fixed.
CREATED = "01/01/1980 00:00:00"
HANDLER = "vision_handler.py"
# The spec of schema 1 holds this file's digest.
_GEOMETRY_CODE = "beeline/pixels.py"
# Deflate reaches 1032 to 1 on zeros; weights, code and pictures stay below 10 to 1.
RULES = zips.Rules(ArchiveError, "copy or build it again", 2_000, 4 << 30, 100, plain=True)
# What reading a damaged archive, or JSON of another form, raises.
_BROKEN = (*zips.BROKEN, KeyError, TypeError, IndexError, AttributeError)


@dataclass(frozen=True)
class Golden:
    """A golden picture: its file in the archive, and the label that the model must put first for it."""

    file: str
    label: str


@dataclass(frozen=True)
class Archive:
    """One `.mar` with its model's name and version; one without golden pictures was not built by Beeline."""

    path: Path
    model: str
    version: str
    goldens: tuple[Golden, ...] = ()

    @property
    def golden(self) -> Golden | None:
        """The first golden picture."""
        return self.goldens[0] if self.goldens else None

    def golden_bytes(self, golden: Golden | None = None) -> bytes:
        """Return a golden picture, the first one unless another is given.

        Raises:
            ArchiveError: when there is none, or the archive changed since it was read.
        """
        golden = golden or self.golden
        if golden is None:
            raise ArchiveError(f"{self.path} has no golden picture to try; build it with `beeline archive build`")
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(golden.file)
        except _BROKEN as error:
            raise ArchiveError(f"{self.path} lost {golden.file} ({error}); build it again") from error


@dataclass(frozen=True)
class Contents:
    """What lies in an archive: its spec, handler, golden pictures, and bytes and digest of each file."""

    spec: ModelSpec
    handler: str
    pictures: tuple[dict[str, Any], ...]
    detects: tuple[str, ...]
    sizes: dict[str, int]
    digests: dict[str, str]


def read(path: Path) -> Archive:
    """Read the model's name and version and the golden pictures of any archive, ours or not.

    Raises:
        ArchiveError: when it is no archive.
    """
    listing = f"{GOLDEN}/{EXPECTED}"
    try:
        with zipfile.ZipFile(path) as archive:
            model = json.loads(archive.read(MANIFEST))["model"]
            pictures = json.loads(archive.read(listing))["pictures"] if listing in archive.namelist() else ()
        goldens = tuple(Golden(f"{GOLDEN}/{picture['file']}", str(picture["top"][0][0])) for picture in pictures)
        return Archive(path, str(model["modelName"]), str(model.get("modelVersion", "1.0")), goldens)
    except _BROKEN as error:
        raise ArchiveError(
            f"{path} cannot be read as a model archive ({type(error).__name__}: {error}); build it again"
        ) from error


def check_record(path: Path) -> None:
    """Refuse files that the archive's record does not list, before they can be imported.

    A worker checks the same record, but only after Python has looked for torch and numpy in its folder.
    An archive without a record was not built by Beeline and is served as it is.

    Raises:
        ArchiveError: naming the first file that is not as the record lists it.
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
    """Compare every file of an archive with the archive's record of it, the spec and the manifest included.

    Raises:
        ArchiveError: naming the first thing that is unsafe, missing or differs, with both digests.
    """
    with opened(mar) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        record = _json(archive, CHECKSUMS, mar)
        spec = _spec(archive, mar)
        digests = _check_files(archive, mar, record, set(sizes))
        _check_identity(mar, record, spec, digests)
        handler = _check_manifest(_bytes(archive, MANIFEST, mar), spec, sizes)
        expected = _json(archive, f"{GOLDEN}/{EXPECTED}", mar)
    pictures = expected.get("pictures")
    if not isinstance(pictures, list) or not pictures:
        raise ArchiveError(f"{mar} lists no golden picture; export the model again")
    return Contents(spec, handler, tuple(pictures), tuple(expected.get("detects", ())), sizes, digests)


@contextmanager
def opened(mar: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive for reading, after every name, size and type in it was judged.

    Raises:
        ArchiveError: naming the first entry that is unsafe, or how the file is broken.
    """
    _check_there(mar)
    with zips.opened(mar, RULES) as archive:
        yield archive


def unpack(mar: Path, folder: Path) -> None:
    """Unpack an archive into `folder`, which must be empty.

    Raises:
        ArchiveError: as `opened`; nothing outside `folder` is ever touched.
    """
    _check_there(mar)
    zips.unpack(mar, folder, RULES)


def renamed(mar: Path, model: str, folder: Path) -> Path:
    """Copy an archive into a folder under another model's name; nothing is compressed.

    Returns:
        The new file, which has the model's name.
    """
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
    """Return an archive's manifest, as torch-model-archiver 0.12 writes it, with a fixed date.

    Args:
        spec: of the model.
        handler: the file name of the handler.
        has_config: whether the archive holds a `model-config.yaml`.
    """
    model = {
        "modelName": spec.name,
        "modelVersion": spec.version,
        "serializedFile": spec.model.file,
        "handler": handler,
        **({"configFile": CONFIG_FILE} if has_config else {}),
    }
    return {"createdOn": CREATED, "runtime": "python", "model": model, "archiverVersion": "0.12.0"}


def _check_there(mar: Path) -> None:
    if not mar.is_file():
        raise ArchiveError(f"the archive {mar} is missing; build it with `beeline archive build`, or name another")


def _bytes(archive: zipfile.ZipFile, name: str, mar: Path) -> bytes:
    try:
        return archive.read(name)
    except KeyError as error:
        raise ArchiveError(f"{mar} holds no {name}; build it with `beeline archive build`") from error


def _json(archive: zipfile.ZipFile, name: str, mar: Path) -> dict[str, Any]:
    try:
        values = json.loads(_bytes(archive, name, mar))
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
    covered = names - {CHECKSUMS, MANIFEST}
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
    """Compare the spec's fingerprint, and the digests that it holds, with the archive's files."""
    named = dict(spec.model.digests)
    if spec.geometry_sha256 is not None:
        named[_GEOMETRY_CODE] = spec.geometry_sha256
    for what, expected, actual in (
        ("the spec's fingerprint", record.get("fingerprint"), spec.fingerprint()),
        *((name, expected, digests.get(name)) for name, expected in named.items()),
    ):
        if expected != actual:
            raise _differs(mar, what, str(expected), str(actual))


def _check_manifest(raw: bytes, spec: ModelSpec, files: Collection[str]) -> str:
    """Compare every key of the manifest with the spec, since some keys make a server install packages."""
    try:
        actual: dict[str, Any] = dict(json.loads(raw))
        model = dict(actual.pop("model"))
        handler = str(model["handler"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArchiveError(f"{MANIFEST} cannot be read ({type(error).__name__}: {error}); build it again") from error
    expected = manifest(spec, handler, CONFIG_FILE in files)
    expected["archiverVersion"] = actual.get("archiverVersion")
    for prefix, right, found in (("model.", expected.pop("model"), model), ("", expected, actual)):
        for key in (*right, *found):
            if right.get(key) != found.get(key):
                raise ArchiveError(
                    f"{MANIFEST} has {prefix}{key} {found.get(key)!r}, expected {right.get(key)!r}; "
                    "it was changed since: build it again"
                )
    if handler not in files or not handler.endswith(".py"):
        raise ArchiveError(f"{MANIFEST} names the handler {handler!r}, which is not in the archive; build it again")
    return handler


def _differs(mar: Path, what: str, expected: str, actual: str) -> ArchiveError:
    return ArchiveError(
        f"{mar}: {what} has sha256 {actual[:SHORT]}, expected {expected[:SHORT]}; it was changed since: build it again"
    )
