"""This machine's resources: usable cores and memory, and GPUs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import psutil

from beeline.settings import CGROUPS, cgroups, cores

__all__ = ["cores", "free_memory", "gpus", "memory"]

# The files of limit and usage, by the controller's folder: "" in cgroups version 2.
_MEMORY = {"": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}


def memory() -> int:
    """Return the bytes of memory of this machine."""
    return int(psutil.virtual_memory().total)


def free_memory(root: Path = CGROUPS) -> int:
    """Return the free bytes of memory, within the limits of the cgroup and of its parents."""
    free = int(psutil.virtual_memory().available)
    for controller, names in _MEMORY.items():
        for folder in cgroups(controller, root):
            try:
                limit, used = (int((folder / name).read_text()) for name in names)
            except (OSError, ValueError):
                # The other version of cgroups, or "max": no limit.
                continue
            free = min(free, max(0, limit - used))
    return free


def gpus() -> list[str]:
    """Return the names of the GPUs that `nvidia-smi` lists, as both servers do; an empty list where it fails."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"^GPU \d+: (.*?)(?: \(UUID: .*)?$", listing, re.MULTILINE)
