"""What this machine offers: processor cores and memory that may be used, and GPUs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import psutil

# cgroup v2 has both numbers in one file, v1 each in its own.
_CGROUP = Path("/sys/fs/cgroup")
_QUOTA = ("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")
_MEMORY = ("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")


def cores(cgroup: Path = _CGROUP) -> int:
    """Return how many cores this process may use: its CPU affinity, less where a container's quota is tighter."""
    usable = len(os.sched_getaffinity(0))
    for names in _QUOTA:
        try:
            limit, period = (int(number) for name in names for number in (cgroup / name).read_text().split())
        except (OSError, ValueError):
            # Not this version, or "max": no quota.
            continue
        if limit > 0:
            usable = min(usable, -(-limit // period))
    return max(1, usable)


def memory() -> int:
    """Return the bytes of memory that this machine has."""
    return int(psutil.virtual_memory().total)


def free_memory(cgroup: Path = _CGROUP) -> int:
    """Return the bytes of memory that are free, less where a container's limit is tighter."""
    free = int(psutil.virtual_memory().available)
    for names in _MEMORY:
        try:
            limit, used = (int((cgroup / name).read_text()) for name in names)
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
