"""An exported folder to a `.mar` in the store, by torch-model-archiver; the same input gives the same bytes."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from archive import verify
from archive.mar import CONFIG_FILE, CREATED, HANDLER, MANIFEST
from archive.store import STORE, Entry, expected_sha256, put
from beeline import pixels
from beeline.errors import ArchiveError, ConfigError, Undetermined, did_you_mean
from beeline.spec import CHECKSUMS, EXPECTED, FILE_NAME, GOLDEN, ModelSpec
from host.files import SHORT, sha256

HANDLERS = Path(__file__).resolve().parents[1] / "handlers"
_ARCHIVER = "model_archiver.model_packaging"
# TorchServe would let a model-config.yaml override these, which belong into `config/config.properties`.
_OWNED_KEYS = {
    "batchSize",
    "maxBatchDelay",
    "minWorkers",
    "maxWorkers",
    "jobQueueSize",
    "responseTimeout",
    "startupTimeout",
}
_CONFIG_KEYS = {"deviceType": (str,), "deviceIds": (list,), "maxRetryTimeoutInSec": (int,), "useJobTicket": (bool,)}
_REFUSED_KEYS = {
    "clientTimeoutInMills": "clients whose time is over would wait forever without an answer",
    "asyncCommunication": "batches of two and more hang",
    "useVenv": "the worker would install packages when it starts",
}
# The oldest time that a zip file can tell.
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Built:
    """An archive in the store, and the seconds that building it took.

    `verified` is None when verification was left out; `reused` says that the very same archive was there already.
    """

    path: Path
    sha256: str
    bytes: int
    spec: ModelSpec
    seconds: float
    verified: verify.Verified | None = None
    reused: bool = False


def build(
    export: Path,
    store: Path = STORE,
    *,
    handler: Path | None = None,
    config: Path | None = None,
    check: bool = True,
    reuse: bool = False,
    handlers: Path = HANDLERS,
    measured: dict[str, float | str] | None = None,
) -> Built:
    """Build `<name>.mar` from an exported folder, verify it, and only then put it into the store.

    The same input gives the same bytes, in any working folder, at any time, with any umask and file times.

    Args:
        export: holds the model, `model_spec.json` and `golden/`.
        store: the folder for archives, made if it is missing.
        handler: a file with one subclass of `VisionHandler`, instead of it.
        config: a `model-config.yaml` to put in.
        check: verify before the archive replaces an older one.
        reuse: leave an archive of the same bytes in the store as it is, without verifying it again.
        handlers: the source root of what ships.
        measured: for the index: the time of each engine and precision that was compared.

    Raises:
        BeelineError: why it cannot be built or does not verify; the store is left as it was.
    """
    start = time.perf_counter()
    spec = _check_export(export)
    store.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=store) as name:
        scratch = Path(name)
        payload = scratch / "payload"
        entry_file = _stage(payload, spec, export, handlers, handler, config)
        draft = scratch / f"{spec.name}.mar"
        _normalise(_archive(scratch, spec, entry_file, has_config=config is not None), draft)
        digest, size = sha256(draft), draft.stat().st_size
        path = store / draft.name
        if reuse and path.is_file() and expected_sha256(path) == digest == sha256(path):
            return Built(path, digest, size, spec, time.perf_counter() - start, reused=True)
        verified = _verify(draft, path) if check else None
        put(store, draft, path.name, Entry(digest, spec.name, spec.version, spec.fingerprint(), size, measured))
    return Built(path, digest, size, spec, time.perf_counter() - start, verified)


def _verify(draft: Path, path: Path) -> verify.Verified:
    """Verify the draft; results and errors name the path that it will get."""
    try:
        return dataclasses.replace(verify.verify(draft), mar=path)
    except ArchiveError as error:
        raise ArchiveError(str(error).replace(str(draft), str(path))) from error


def _check_export(export: Path) -> ModelSpec:
    """Read the spec, and check that model, geometry code and goldens are those of the export."""
    spec = ModelSpec.load(export)
    for name, expected in spec.model.digests.items():
        model = export / name
        if not model.is_file():
            raise ArchiveError(f"{model} is missing; export the model again")
        actual = sha256(model)
        if actual != expected:
            raise ArchiveError(
                f"{model} has sha256 {actual[:SHORT]}, its spec says {expected[:SHORT]}; export the model again"
            )
    if spec.geometry_version != pixels.GEOMETRY:
        made_with = (
            "before geometry had a version" if spec.geometry_version is None else f"with {spec.geometry_version}"
        )
        raise ArchiveError(
            f"{export} was exported {made_with}, and beeline/pixels.py has version {pixels.GEOMETRY}; export the model "
            "again: `beeline train` for a run, `beeline archive build --model` for a file"
        )
    if not (export / GOLDEN / EXPECTED).is_file():
        raise ArchiveError(f"{export / GOLDEN / EXPECTED} is missing; export the model again")
    return spec


def _stage(
    payload: Path, spec: ModelSpec, export: Path, handlers: Path, handler: Path | None, config: Path | None
) -> str:
    """Lay out the archive's files in `payload` with their checksums; return the handler's file name."""
    shutil.copytree(handlers, payload, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"))
    entry_file = HANDLER
    if handler is not None:
        entry_file = _check_handler(handler, payload)
        shutil.copyfile(handler, payload / entry_file)
    for name in spec.model.digests:
        shutil.copyfile(export / name, payload / name)
    shutil.copyfile(export / FILE_NAME, payload / FILE_NAME)
    (payload / GOLDEN).mkdir()
    pictures = json.loads((export / GOLDEN / EXPECTED).read_text(encoding="utf-8"))["pictures"]
    for name in (EXPECTED, *(Path(str(picture["file"])).name for picture in pictures)):
        shutil.copyfile(export / GOLDEN / name, payload / GOLDEN / name)
    if config is not None:
        check_config(config)
        shutil.copyfile(config, payload / CONFIG_FILE)
    files = {
        path.relative_to(payload).as_posix(): sha256(path) for path in sorted(payload.rglob("*")) if path.is_file()
    }
    record = {"schema": 1, "fingerprint": spec.fingerprint(), "files": dict(sorted(files.items()))}
    (payload / CHECKSUMS).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return entry_file


def check_config(path: Path) -> None:
    """Refuse keys that would be ignored or do harm in a user's model-config.yaml; TorchServe ignores unknown ones.

    Raises:
        ConfigError: naming the key, its value and the fix.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{path} cannot be read as YAML ({why}); mend it or leave --model-config out") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; allowed: keys and values, as deviceType: cpu")
    for key, value in values.items():
        if key in _OWNED_KEYS:
            raise ConfigError(
                f"{path} sets {key} to {value!r}, which would override config/config.properties; "
                "set it there, under models"
            )
        if key in _REFUSED_KEYS:
            raise ConfigError(f"{path} sets {key} to {value!r}; leave it out: {_REFUSED_KEYS[key]}")
        if key not in _CONFIG_KEYS:
            raise ConfigError(
                f"{path} has the unknown key {key!r}{did_you_mean(str(key), _CONFIG_KEYS | dict.fromkeys(_OWNED_KEYS))}"
            )
        if type(value) not in _CONFIG_KEYS[key]:
            kind = {str: "text", list: "a list", int: "a whole number", bool: "true or false"}[_CONFIG_KEYS[key][0]]
            raise ConfigError(f"{path} sets {key} to {value!r}; allowed: {kind}")


def _check_handler(handler: Path, payload: Path) -> str:
    """Check a user's handler file without running it: one class, and no function that servers would call instead."""
    name = handler.name
    if (
        handler.suffix != ".py"
        or not handler.stem.isidentifier()
        or (payload / name).exists()
        or (payload / handler.stem).exists()
    ):
        raise ArchiveError(
            f"the handler {handler} cannot have that name; name it like a Python module, not like a file of handlers/"
        )
    try:
        body = ast.parse(handler.read_text(encoding="utf-8"), name).body
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise ArchiveError(f"the handler {handler} cannot be read as Python ({error}); mend it") from error
    classes = [node.name for node in body if isinstance(node, ast.ClassDef)]
    if len(classes) != 1:
        raise ArchiveError(
            f"the handler {handler} defines the classes {', '.join(classes) or 'none'}; both servers need exactly one: "
            "a subclass of VisionHandler"
        )
    if any(isinstance(node, ast.FunctionDef) and node.name == "handle" for node in body):
        raise ArchiveError(
            f"the handler {handler} has a function handle, which servers call instead of its class; rename it"
        )
    return name


def _archive(scratch: Path, spec: ModelSpec, entry_file: str, has_config: bool) -> Path:
    """Run torch-model-archiver, with relative names and its own temporary folder.

    It copies through `<temporary folder>/<model name>`, which two builds of one name would share, and it splits its
    list of files at commas. Only a *folder* among the extra files keeps the tree below it.
    """
    temporary, out = scratch / "tmp", scratch / "raw"
    temporary.mkdir()
    out.mkdir()
    command = [sys.executable, "-m", _ARCHIVER, "--model-name", spec.name, "--version", spec.version]
    command += ["--serialized-file", f"payload/{spec.model.file}", "--handler", f"payload/{entry_file}"]
    command += ["--extra-files", "payload", "--export-path", "raw", "--archive-format", "zip-store"]
    command += ["--config-file", f"payload/{CONFIG_FILE}"] if has_config else []
    environment = {**os.environ, "TMPDIR": str(temporary.resolve())}
    done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    raw = out / f"{spec.name}.mar"
    if done.returncode or not raw.is_file():
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise Undetermined(f"torch-model-archiver failed ({last}); run `make setup` if it is not installed")
    return raw


def _normalise(raw: Path, out: Path) -> None:
    """Write the archive again with a fixed order, dates and permissions.

    Nothing is compressed: weights hardly shrink, and deflate's bytes depend on the version of zlib.
    """
    with zipfile.ZipFile(raw) as source, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as target:
        names = sorted(name for name in source.namelist() if name != MANIFEST)
        for name in (MANIFEST, *names):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.create_system = 3
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            if name == MANIFEST:
                manifest = {**json.loads(source.read(name)), "createdOn": CREATED}
                target.writestr(info, json.dumps(manifest, indent=2, sort_keys=True) + "\n")
                continue
            info.file_size = source.getinfo(name).file_size
            with source.open(name) as reader, target.open(info, "w") as writer:
                shutil.copyfileobj(reader, writer, 1 << 20)
