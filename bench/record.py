"""Files of JSON lines: records of measurements, and the journal with which an interrupted measurement goes on."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from beeline.errors import BeelineError
from bench.pictures import Pictures
from host import ROOT
from host import machine as hardware
from host.files import write_whole

KINDS = ("load", "sweep", "compare", "tune", "search")
SCHEMA = 1
FASTER, SLOWER, SAME = "faster", "slower", "no difference"
# The interval of a ratio holds its median at least this often; five rounds are the fewest with which it can.
_CONFIDENCE = 0.9
# A smaller difference is no reason to choose a server, and a shared machine makes such differences by itself.
_MARGIN = 0.02
# The figures depend on these, where they are installed.
_PACKAGES = ("torch", "torchvision", "openvino", "numpy", "Pillow", "pillow-simd", "torchserve", "pycurl")
# A network's speed on a processor depends on these.
_FEATURES = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512f", "avx2")


def utc() -> str:
    """Return the time now in UTC, in a record's format."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """Return processor, usable cores, features, memory, system, Python, load and GPUs; no host name."""
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.is_file() else ""
    # Of the first processor.
    model, flags = (re.search(rf"(?m)^{key}\s*: (.*)$", text) for key in ("model name", "flags"))
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": hardware.cores(),
        "features": [name for name in _FEATURES if flags and name in flags[1].split()],
        "memory_gb": round(hardware.memory() / 1e9, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "gpus": hardware.gpus(),
    }


def interval(values: Sequence[float], share: float = 0.5, confidence: float = 0.95) -> list[float] | None:
    """Return a confidence interval of the quantile `share`, by rank, or None if there are too few values.

    No distribution is assumed. Importing scipy takes half a second, so do not call it during a load.
    """
    if not len(values):
        return None
    from scipy.stats import quantile_test

    low, high = quantile_test(values, p=share).confidence_interval(confidence)
    return None if math.isnan(low) or math.isnan(high) else [float(low), float(high)]


def judge(rates: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """Compare the requests a second of two servers in the same rounds.

    A machine's speed drifts from round to round, so each round gives one ratio. A server is faster or slower only if
    the interval of their median lies more than `_MARGIN` off 1; too few rounds prove nothing. Return the median
    `ratio` to the other, its `interval` and the `verdict`; each is None if no round has both.
    """
    ratios = sorted(rate / other for rate, other in zip(rates, others, strict=False) if other > 0)
    if not ratios:
        return dict.fromkeys(("ratio", "interval", "verdict"))
    proven, verdict = interval(ratios, confidence=_CONFIDENCE), SAME
    low, high = proven or (ratios[0], ratios[-1])
    if proven and (low > 1 + _MARGIN or high < 1 - _MARGIN):
        verdict = FASTER if low > 1 else SLOWER
    bounds = [round(low, 3), round(high, 3)]
    return {"ratio": round(statistics.median(ratios), 3), "interval": bounds, "verdict": verdict}


def without_user(url: str) -> str:
    """Return an address without its user and password."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def command_line(program: str, words: Sequence[str]) -> str:
    """Return a record's command line: of paths only the last part, of addresses no user and no password."""

    def short(word: str) -> str:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if "://" in value:
            return option + equals + without_user(value)
        return option + equals + (Path(value).name or value if "/" in value else value)

    return f"{program} {shlex.join(map(short, words))}"


@dataclass(frozen=True)
class Record:
    """One measurement."""

    kind: str  # one of `KINDS`; it decides the keys of `result`
    command: str  # that repeats it
    started: str  # as by `utc`
    machine: dict[str, Any]
    versions: dict[str, str]
    pictures: dict[str, Any]  # as by `Pictures.to_dict`; empty if none were sent
    result: dict[str, Any]
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.schema != SCHEMA:
            known = f"known are {', '.join(KINDS)} and {SCHEMA}"
            raise ValueError(f"its kind is {self.kind!r} and its schema {self.schema!r}; {known}")

    @classmethod
    def now(cls, kind: str, command: str, result: dict[str, Any], sent: Pictures | None, started: str = "") -> Record:
        """Return the record of a measurement on this machine that has just ended; `started` is an earlier `utc()`."""
        versions = {}
        for package in _PACKAGES:
            with suppress(metadata.PackageNotFoundError):
                versions[package] = metadata.version(package)
        return cls(kind, command, started or utc(), machine(), versions, sent.to_dict() if sent else {}, result)


def check_writable(path: Path | None) -> None:
    """Make the folder of a file of records; raise `BeelineError` if a record cannot be added."""
    try:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise BeelineError(f"--out is {path}, which cannot be written ({error.strerror}); name another file") from error


def append(path: Path | None, record: Record) -> None:
    """Add a record's line to a file, if there is one."""
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record), ensure_ascii=False, allow_nan=False) + "\n")


def read(path: Path) -> list[Record]:
    """Return a file's records, oldest first; raise `BeelineError` if it has none, or a line that is no record."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else (), 1):
        try:
            records.append(Record(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise BeelineError(f"{path}:{number} is no record ({error}); take that line out") from error
    if not records:
        raise BeelineError(f"{path} holds no record; measure with `beeline bench ... --out {path.name}` first")
    return records


@dataclass
class Journal:
    """A file of JSON lines that takes each figure as soon as it is measured, so that an interrupted job can go on.

    Its first line says what is measured; each other line is one of `rows`, a name and a JSON value.
    """

    path: Path
    rows: list[tuple[str, Any]] = field(default_factory=list)

    @classmethod
    def job(cls, job: str | Path, about: Mapping[str, Any]) -> Journal:
        """Continue a file about the same, without a last line that broke off; otherwise start a new one.

        A name instead of a path means a file in the state folder.
        """
        folder = Path(os.environ.get("BEELINE_STATE") or ROOT / ".beeline").resolve() / "bench"
        path = folder / f"{job}.journal" if isinstance(job, str) else job
        first, rows = {"about": json.loads(json.dumps(about))}, []
        with suppress(OSError, ValueError):
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
            before, *after = map(json.loads, lines)
            rows = [(name, value) for name, value in after] if before == first else []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, "".join(f"{json.dumps(line)}\n" for line in (first, *rows)))
        except OSError as error:
            raise BeelineError(f"{path} cannot be written ({error.strerror}); set BEELINE_STATE") from error
        return cls(path, rows)

    def add(self, name: str, value: Any) -> None:
        """Append a row in one call, which no signal's exception interrupts."""
        line = json.dumps([name, value], allow_nan=False).encode() + b"\n"
        try:
            with self.path.open("ab", buffering=0) as file:
                file.write(line)
        except OSError as error:
            raise BeelineError(f"{self.path} cannot be written ({error.strerror}); make room there") from error
        self.rows.append((name, json.loads(line)[1]))

    def of(self, name: str) -> list[Any]:
        """Return the values of that name, oldest first."""
        return [value for each, value in self.rows if each == name]

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return the value of that name; measure it if the file does not have it."""
        if not self.of(name):
            self.add(name, measure())
        return self.of(name)[0]
