"""What this machine offers: processor cores that may be used, and GPUs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def cores(quota: Path = _QUOTA) -> int:
    """Return how many cores this process may use: its CPU affinity, less where a container's quota is tighter."""
    usable = len(os.sched_getaffinity(0))
    try:
        limit, period = quota.read_text().split()
        usable = min(usable, -(-int(limit) // int(period)))
    except (OSError, ValueError):
        # No cgroup v2 here, or "max": no quota.
        return usable
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
