"""From an exported folder to a `.mar` in the store. The same input gives the same bytes."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import shutil
import stat
import tempfile
import time
import zipfile
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from archive import verify
from archive.mar import CONFIG_FILE, HANDLER, MANIFEST, manifest
from archive.store import STORE, Entry, file_of, put, read_index
from archive.variants import default_engine
from beeline import pixels
from beeline.errors import ArchiveError, ConfigError, did_you_mean, short
from beeline.spec import CHECKSUMS, EXPECTED, FILE_NAME, GOLDEN, ModelSpec
from host.files import SHORT, sha256

HANDLERS = Path(__file__).resolve().parents[1] / "handlers"
_CONFIG_KEYS = {"deviceType": str, "deviceIds": list, "maxRetryTimeoutInSec": int, "useJobTicket": bool}
_BATCHING_KEYS = (
    "batchSize", "maxBatchDelay", "minWorkers", "maxWorkers", "jobQueueSize", "responseTimeout", "startupTimeout"
)  # fmt: skip
# A model-config.yaml with these keys is refused, for these reasons.
_REFUSED_KEYS = {
    **dict.fromkeys(
        _BATCHING_KEYS, "which would override config/config.properties; leave it out and set it there, under models"
    ),
    "clientTimeoutInMills": "with which a client gets no answer after the timeout and waits forever; leave it out",
    "asyncCommunication": "with which batches of two and more hang; leave it out",
    "useVenv": "with which the worker installs packages when it starts; leave it out",
}
# The version of this file and of `archive.variants`: raise it when the same export gives another archive.
BUILD = 1
# The oldest date that a zip file can hold.
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Built:
    """An archive in the store, and the seconds that the build took.

    `verified` is None if verification was left out; `reused` means that the store held the same archive already.
    """

    path: Path
    sha256: str
    bytes: int
    spec: ModelSpec
    seconds: float
    verified: verify.Verified | None = None
    reused: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        verified = self.verified.to_dict() if self.verified else None
        about = {"bytes": self.bytes, "seconds": round(self.seconds, 3), "reused": self.reused, "verified": verified}
        engine = {"engine": self.spec.engine, "precision": self.spec.precision}
        return {**verify.identity(self.path, self.sha256, self.spec), **about, **engine}


def build(
    export: Path,
    store: Path = STORE,
    *,
    handler: Path | None = None,
    config: Path | None = None,
    check: bool = True,
    reuse: bool = False,
    default: bool = False,
    handlers: Path = HANDLERS,
    measured: dict[str, float | str] | None = None,
    origin: str | None = None,
) -> Built:
    """Build an archive from an exported folder, verify it, and only then put it into the store, as `file_of` names it.

    The same input gives the same bytes: in any working folder, at any time, with any umask and file times. When an
    error says why it cannot be built or verified, the store is unchanged.

    Args:
        export: holds the model, `model_spec.json` and `golden/`.
        store: the folder of archives; it is made if it is missing.
        handler: a file with one subclass of `VisionHandler`, which replaces the default handler.
        config: a `model-config.yaml` to include.
        check: verify the archive before it replaces an older one.
        reuse: if the store holds an archive of the same bytes, keep it and do not verify it again.
        default: make this version the model's default; the first version is it anyway.
        handlers: the folder with the handler's source code.
        measured: see `Entry`.
        origin: see `Entry`.
    """
    start = time.perf_counter()
    spec = _check_export(export)
    store.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=store) as scratch:
        payload, draft = Path(scratch) / "payload", Path(scratch) / f"{spec.name}.mar"
        entry_file = _collect(payload, spec, export, handlers, handler, config)
        _write(draft, payload, manifest(spec, entry_file, has_config=config is not None))
        digest, size = sha256(draft), draft.stat().st_size
        path = store / file_of(store, spec.name, spec.version)
        known = read_index(store).get(path.name) if reuse and path.is_file() else None
        if known and known.sha256 == digest == sha256(path) and (known.default or not default):
            return Built(path, digest, size, spec, time.perf_counter() - start, reused=True)
        verified = _verify(draft, path) if check else None
        entry = Entry(digest, spec.name, spec.version, spec.fingerprint(), size, measured, origin=origin)
        path = put(store, draft, entry, default)
    return Built(path, digest, size, spec, time.perf_counter() - start, verified)


def origin(export: Path, handlers: Path = HANDLERS) -> str:
    """Return the sha256 over all that decides on the archive of an exported folder without options."""
    _check_export(export)
    versions = [metadata.version(name) for name in ("torch", "openvino") if find_spec(name)]
    code = {str(path.relative_to(handlers)): sha256(path) for path in handlers.rglob("*.py")}
    files = [sha256(export / name) for name in (FILE_NAME, f"{GOLDEN}/{EXPECTED}")]
    parts = [BUILD, default_engine().value, versions, sorted(code.items()), files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def unchanged(export: Path, store: Path, origin: str) -> Built | None:
    """Return the archive in the store that was made of the same `origin`; None where there is none, or it changed."""
    start = time.perf_counter()
    asked = ModelSpec.load(export)
    path = store / file_of(store, asked.name, asked.version)
    entry = read_index(store).get(path.name)
    if entry is None or entry.origin != origin or not path.is_file() or sha256(path) != entry.sha256:
        return None
    with zipfile.ZipFile(path) as archive:
        spec = ModelSpec.from_dict(json.loads(archive.read(FILE_NAME)))
    return Built(path, entry.sha256, entry.bytes, spec, time.perf_counter() - start, reused=True)


def _verify(draft: Path, path: Path) -> verify.Verified:
    """Verify the draft; the result and errors name its final path."""
    try:
        return dataclasses.replace(verify.verify(draft), mar=path)
    except ArchiveError as error:
        raise ArchiveError(str(error).replace(str(draft), str(path))) from error


def _check_export(export: Path) -> ModelSpec:
    """Read the spec, and check that the model, the geometry code and the goldens match it."""
    spec = ModelSpec.load(export)
    for name, expected in {**spec.digests, f"{GOLDEN}/{EXPECTED}": None}.items():
        path = export / name
        if not path.is_file():
            raise ArchiveError(f"{path} is missing; export the model again")
        if expected and (actual := sha256(path)) != expected:
            raise ArchiveError(f"{path} has sha256 {actual[:SHORT]}, its spec says {expected[:SHORT]}; export it again")
    if spec.geometry_version != pixels.GEOMETRY:
        version = spec.geometry_version
        made = "before geometry had a version" if version is None else f"with geometry version {version}"
        made = f"was exported {made}, and beeline/pixels.py has version {pixels.GEOMETRY}"
        fix = "export the model again: `beeline train` for a run, `beeline archive build --model` for a file"
        raise ArchiveError(f"{export} {made}; {fix}")
    return spec


def _collect(
    payload: Path, spec: ModelSpec, export: Path, handlers: Path, handler: Path | None, config: Path | None
) -> str:
    """Copy the archive's files into `payload` and write their checksums; return the handler's file name."""
    shutil.copytree(handlers, payload, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"))
    if handler is not None:
        _check_handler(handler, payload)
        shutil.copyfile(handler, payload / handler.name)
    (payload / GOLDEN).mkdir()
    pictures = json.loads((export / GOLDEN / EXPECTED).read_text(encoding="utf-8"))["pictures"]
    goldens = (EXPECTED, *(Path(str(picture["file"])).name for picture in pictures))
    for name in (*spec.digests, FILE_NAME, *(f"{GOLDEN}/{golden}" for golden in goldens)):
        shutil.copyfile(export / name, payload / name)
    if config is not None:
        check_config(config)
        shutil.copyfile(config, payload / CONFIG_FILE)
    digests = {path.relative_to(payload).as_posix(): sha256(path) for path in payload.rglob("*") if path.is_file()}
    record = {"schema": 1, "fingerprint": spec.fingerprint(), "files": dict(sorted(digests.items()))}
    (payload / CHECKSUMS).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return HANDLER if handler is None else handler.name


def check_config(path: Path) -> None:
    """Raise `ConfigError` for a key of a model-config.yaml that does harm or that TorchServe ignores."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = short(error)
        raise ConfigError(f"{path} cannot be read as YAML ({why}); correct it or leave --model-config out") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; allowed: keys and values, as deviceType: cpu")
    for key, value in values.items():
        if key in _REFUSED_KEYS:
            raise ConfigError(f"{path} sets {key} to {value!r}, {_REFUSED_KEYS[key]}")
        if key not in _CONFIG_KEYS:
            hint = did_you_mean(str(key), (*_CONFIG_KEYS, *_BATCHING_KEYS))
            raise ConfigError(f"{path} has the unknown key {key!r}{hint}")
        kind = _CONFIG_KEYS[key]
        if type(value) is not kind:
            allowed = {str: "text", list: "a list", int: "a whole number", bool: "true or false"}[kind]
            raise ConfigError(f"{path} sets {key} to {value!r}; allowed: {allowed}")


def _check_handler(handler: Path, payload: Path) -> None:
    """Check a user's handler without running it: one class, and no function that servers would call instead."""
    taken = any((payload / name).exists() for name in (handler.name, handler.stem))
    if handler.suffix != ".py" or not handler.stem.isidentifier() or taken:
        raise ArchiveError(f"the handler {handler} cannot have that name; take a new name of a Python module")
    try:
        body = ast.parse(handler.read_text(encoding="utf-8"), handler.name).body
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise ArchiveError(f"the handler {handler} cannot be read as Python ({error}); correct it") from error
    classes = [node.name for node in body if isinstance(node, ast.ClassDef)]
    if len(classes) != 1:
        names = ", ".join(classes) or "none"
        raise ArchiveError(f"the handler {handler} defines the classes {names}; define one subclass of VisionHandler")
    if any(isinstance(node, ast.FunctionDef) and node.name == "handle" for node in body):
        raise ArchiveError(f"the handler {handler} has a function handle, which servers call instead; rename it")


def _write(mar: Path, payload: Path, manifest_values: dict[str, object]) -> None:
    """Write the manifest and then the files with a fixed order, dates and permissions.

    The manifest is torch-model-archiver's. That tool is not run, because it writes the time of the build, and files in
    the order of the file system. Nothing is compressed: weights hardly shrink, and the bytes of deflate depend on the
    version of zlib.
    """

    def entry(name: str) -> zipfile.ZipInfo:
        info = zipfile.ZipInfo(name, _EPOCH)
        info.create_system = 3
        info.external_attr = (stat.S_IFREG | 0o644) << 16
        return info

    files = {path.relative_to(payload).as_posix(): path for path in payload.rglob("*") if path.is_file()}
    with zipfile.ZipFile(mar, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(entry(MANIFEST), json.dumps(manifest_values, indent=2, sort_keys=True) + "\n")
        for name in sorted(files):
            info = entry(name)
            info.file_size = files[name].stat().st_size
            with files[name].open("rb") as reader, archive.open(info, "w") as writer:
                shutil.copyfileobj(reader, writer, 1 << 20)
