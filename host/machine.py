"""This machine's resources: usable cores and memory, and GPUs."""

from __future__ import annotations

import re
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil

from beeline.settings import CGROUPS, cgroups, cores

__all__ = ["cores", "free_memory", "gpus", "memory", "oom_kills"]

# The files of limit and usage, by the controller's folder: "" in cgroups version 2.
_MEMORY = {"": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}


def memory() -> int:
    """Return the bytes of memory of this machine."""
    return int(psutil.virtual_memory().total)


def free_memory(root: Path = CGROUPS) -> int:
    """Return the free bytes of memory, within the limits of the cgroup and of its parents.

    Files that the kernel keeps in memory count as free: it drops them before a limit ends a process.
    """
    free = int(psutil.virtual_memory().available)
    for controller, names in _MEMORY.items():
        for folder in cgroups(controller, root):
            try:
                limit, used = (int((folder / name).read_text()) for name in names)
            except (OSError, ValueError):
                # The other version of cgroups, or "max": no limit.
                continue
            free = min(free, max(0, limit - used + _cached(folder / "memory.stat")))
    return free


def oom_kills(root: Path = CGROUPS) -> int:
    """Return how many processes of this cgroup the kernel has killed for memory; 0 where it does not count them."""
    for controller, name in {"": "memory.events", "memory": "memory.oom_control"}.items():
        for folder in cgroups(controller, root):
            with suppress(OSError):
                found = re.search(r"^oom_kill (\d+)$", (folder / name).read_text(), re.MULTILINE)
                if found is not None:
                    return int(found[1])
    return 0


def _cached(stat: Path) -> int:
    """Return the bytes of files in a cgroup's memory."""
    try:
        values = dict(line.split() for line in stat.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(values.get("active_file", 0)) + int(values.get("inactive_file", 0))


def gpus() -> list[str]:
    """Return the names of the GPUs that `nvidia-smi` lists, as both servers do; an empty list where it fails."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"^GPU \d+: (.*?)(?: \(UUID: .*)?$", listing, re.MULTILINE)
