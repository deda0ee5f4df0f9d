"""One measurement as one line of JSON: its figures, and the machine, versions and pictures that they are of."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from beeline.errors import BeelineError, did_you_mean
from bench.pictures import Pictures
from host import machine as hardware

# "table" is what sweeps were called; a "sweep" whose result has "tried" is a search.
KINDS = ("load", "sweep", "compare", "tune", "search", "table")
SCHEMA = 1
# What the figures depend on, where it is installed.
_PACKAGES = ("torch", "torchvision", "openvino", "numpy", "Pillow", "pillow-simd", "torchserve", "pycurl")
# What decides how fast a network runs on a processor.
_FEATURES = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512f", "avx2")
_CPUINFO = Path("/proc/cpuinfo")


def utc() -> str:
    """Return the time now, in UTC, as records have it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def machine(cpuinfo: Path = _CPUINFO) -> dict[str, Any]:
    """Return processor, usable cores, features, memory, system, Python, load and GPUs; no host name."""
    try:
        first = cpuinfo.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        first = ""
    lines = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    flags = lines.get("flags", "").split()
    return {
        "cpu": lines.get("model name") or platform.processor() or platform.machine(),
        "cores": hardware.cores(),
        "features": [name for name in _FEATURES if name in flags],
        "memory_gb": round(hardware.memory() / 1e9, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "gpus": hardware.gpus(),
    }


def versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each package; one that is not installed is left out."""
    installed = {}
    for package in packages:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def without_user(url: str) -> str:
    """Return an address without the user and the password that it may hold."""
    scheme, marks, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return scheme + marks + host.rpartition("@")[2] + slash + path


def command_line(program: str, words: Sequence[str]) -> str:
    """Return the command line of a record: of paths only the last part, of addresses no user and password."""

    def short(word: str) -> str:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if "://" in value:
            return option + equals + without_user(value)
        return option + equals + (Path(value).name or value if "/" in value else value)

    return f"{program} {shlex.join(map(short, words))}"


@dataclass(frozen=True)
class Record:
    """One measurement.

    Attributes:
        kind: one of `KINDS`; it decides the keys of `result`.
        command: the command line that measures it again.
        started: when, ISO 8601 in UTC.
        machine: as `machine()` returns it.
        versions: by package.
        pictures: as `Pictures.to_dict` has it; empty where none were sent.
        result: the figures.
        schema: of this record.
    """

    kind: str
    command: str
    started: str
    machine: dict[str, Any]
    versions: dict[str, str]
    pictures: dict[str, Any]
    result: dict[str, Any]
    schema: int = SCHEMA

    @classmethod
    def now(
        cls,
        kind: str,
        command: str,
        result: dict[str, Any],
        pictures: Pictures | dict[str, Any] | None,
        more_versions: dict[str, str] | None = None,
        started: str | None = None,
    ) -> Record:
        """Return the record of a measurement on this machine that has just ended; `started` is an earlier `utc()`."""
        images = pictures.to_dict() if isinstance(pictures, Pictures) else pictures or {}
        installed = versions(*_PACKAGES) | (more_versions or {})
        return cls(kind, command, started or utc(), machine(), installed, images, result)


def check_writable(path: Path | None) -> None:
    """Raise `BeelineError` where a record cannot be added, before anything is measured for it."""
    try:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not path.exists()
            path.open("a", encoding="utf-8").close()
            if is_new:
                path.unlink()
    except OSError as error:
        raise BeelineError(f"--out is {path}, which cannot be written ({error.strerror}); name another file") from error


def append(path: Path, record: Record) -> None:
    """Add one line to a file, which is made where it is not there."""
    line = json.dumps(asdict(record), ensure_ascii=False, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read(path: Path) -> list[Record]:
    """Return a file's records, oldest first.

    Raises:
        BeelineError: naming the line that is no record.
    """
    if not path.is_file():
        raise BeelineError(f"{path} is not there; measure with `beeline bench ... --out {path.name}` first")
    lines = path.read_text(encoding="utf-8").splitlines()
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def _parse(line: str, where: str) -> Record:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise BeelineError(f"{where} is no JSON ({error}); take that line out") from error
    known = {field.name for field in fields(Record)}
    if not isinstance(values, dict) or set(values) != known:
        raise BeelineError(f"{where} is no record; one has the keys {', '.join(sorted(known))}")
    if values["schema"] != SCHEMA:
        raise BeelineError(f"{where} has schema {values['schema']!r}, known is {SCHEMA}; measure it again")
    if values["kind"] not in KINDS:
        raise BeelineError(f"{where} has the kind {values['kind']!r}{did_you_mean(str(values['kind']), KINDS)}")
    return Record(**values)
