"""What this machine offers: processor cores that may be used, and GPUs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

# cgroup v2 has both numbers in one file, v1 each in its own.
_QUOTA = ("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")


def cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
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


def gpus() -> int:
    """Return how many GPUs `nvidia-smi` lists; both servers ask it too. 0 where it is not there or fails."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return 0
    try:
        listing = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listing.splitlines())
