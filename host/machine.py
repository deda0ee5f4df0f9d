"""What this machine offers: processor cores that may be used, and GPUs."""

from __future__ import annotations

import shutil
import subprocess

from beeline.settings import cores

__all__ = ["cores", "gpus"]


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
