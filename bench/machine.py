"""The machine that a figure was measured on, as its record tells it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

from host import machine

# What decides how fast a network runs on a processor.
FEATURES = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512f", "avx2")
_CPUINFO = Path("/proc/cpuinfo")


def describe(cpuinfo: Path = _CPUINFO) -> dict[str, object]:
    """Return processor, usable cores, features, memory, system, Python, load and GPUs; no host name."""
    lines = _lines(cpuinfo)
    flags = set(lines.get("flags", "").split())
    return {
        "cpu": lines.get("model name") or platform.processor() or platform.machine(),
        "cores": machine.cores(),
        "features": [name for name in FEATURES if name in flags],
        "memory_gb": round(machine.memory() / 1e9, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "gpus": machine.gpus(),
    }


def summary() -> str:
    """Return usable cores, architecture and system, such as `4 cores, x86_64, Linux`."""
    return f"{machine.cores()} cores, {platform.machine()}, {platform.system()}"


def versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each package; one that is not installed is left out."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _lines(cpuinfo: Path) -> dict[str, str]:
    """Return the first processor's lines by name; none where the system has no such file."""
    try:
        first = cpuinfo.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
