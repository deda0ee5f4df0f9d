"""What this machine offers: processor cores and memory that may be used, and GPUs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import psutil

from beeline.settings import CGROUPS, cgroups, cores

__all__ = ["cores", "free_memory", "gpus", "memory"]

# By the controller's folder in version 1: what may be used, and what is.
_MEMORY = {"": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}


def memory() -> int:
    """Return the bytes of memory that this machine has."""
    return int(psutil.virtual_memory().total)


def free_memory(root: Path = CGROUPS) -> int:
    """Return the bytes of memory that are free, less where the limit of a cgroup or of a parent is tighter."""
    free = int(psutil.virtual_memory().available)
    for controller, names in _MEMORY.items():
        for folder in cgroups(controller, root):
            try:
                limit, used = (int((folder / name).read_text()) for name in names)
            except (OSError, ValueError):
                # Not this version, or "max": no limit.
                continue
            free = min(free, max(0, limit - used))
    return free


def gpus() -> list[str]:
    """Return the names of the GPUs that `nvidia-smi` lists; both servers ask it too. None where it fails."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    try:
        listing = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"^GPU \d+: (.*?)(?: \(UUID: .*)?$", listing, re.MULTILINE)
