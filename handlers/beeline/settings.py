"""What a worker reads of its environment and machine: limits, threads, device, cores; each choice has a reason."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from beeline.errors import ConfigError

MAX_BYTES = 20_000_000
MAX_PIXELS = 50_000_000
SECONDS = 60

# Where cgroups are mounted, and where the kernel lists those of this process.
CGROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# By controller, the files with the two numbers of a quota: version 2 has one file, version 1 two.
_QUOTA = {"": ("cpu.max",), "cpu": ("cpu.cfs_quota_us", "cpu.cfs_period_us")}


@dataclass(frozen=True)
class Choice:
    """A value that was chosen automatically, and why."""

    value: str
    reason: str


@dataclass(frozen=True)
class Limits:
    """The most bytes and pixels that one picture may have, and seconds for its answer; the launcher sets all three."""

    max_bytes: int = MAX_BYTES
    max_pixels: int = MAX_PIXELS
    seconds: int = SECONDS

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Limits:
        """Read `BEELINE_MAX_BYTES`, `BEELINE_MAX_PIXELS` and `BEELINE_DEADLINE`; raise `ConfigError` as `positive`."""
        return cls(
            positive(environ, "BEELINE_MAX_BYTES", MAX_BYTES),
            positive(environ, "BEELINE_MAX_PIXELS", MAX_PIXELS),
            positive(environ, "BEELINE_DEADLINE", SECONDS),
        )


def positive(environ: Mapping[str, str], name: str, default: int) -> int:
    """Return the environment variable `name`, a whole number over 0, or `default`; else raise `ConfigError`."""
    text = environ.get(name, "").strip()
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{name} is {text!r}; set it to a whole number over 0, or unset it for {default}")
    return int(text)


def threads_of(asked: int | None, environ: Mapping[str, str]) -> Choice:
    """Return how many threads a forward pass takes."""
    if asked is not None:
        return Choice(str(asked), "asked for")
    if environ.get("BEELINE_THREADS"):
        return Choice(str(positive(environ, "BEELINE_THREADS", 1)), "BEELINE_THREADS")
    return Choice("1", "no BEELINE_THREADS: one thread a worker, since servers start a worker a core")


def parsed_device(asked: str) -> tuple[str, int | None]:
    """Return `auto`, `cpu` or `cuda`, and of `cuda:<index>` the index; raise `ConfigError` for anything else."""
    name, colon, index = asked.partition(":")
    if name not in ("auto", "cpu", "cuda") or (colon and (name != "cuda" or not index.isdecimal())):
        raise ConfigError(f"BEELINE_DEVICE is {asked!r}; allowed: auto, cpu, cuda or cuda:<index>")
    return name, int(index) if index else None


def device_of(asked: str, gpu_id: int | None, devices: int | None, fact: str, fix: str = "") -> Choice:
    """Return where an engine runs: `cpu` or `cuda:<index>`.

    Args:
        asked: `auto`, `cpu`, `cuda` or `cuda:<index>`.
        gpu_id: the CUDA device that the server assigned to this worker, where `asked` has no index.
        devices: how many CUDA devices the engine can use; None where it can use some and does not count them.
        fact: what the engine found on this machine; it is the reason of `auto`.
        fix: another way out for the error's sentence.

    Raises:
        ConfigError: for a CUDA device that is not there.
    """
    name, index = parsed_device(asked)
    if name == "cpu" or (name == "auto" and devices == 0):
        return Choice("cpu", "asked for" if name == "cpu" else fact)
    if devices is not None and (index or 0) >= devices:
        raise ConfigError(f"BEELINE_DEVICE is {asked!r}, and {fact}: use auto or cpu{fix}")
    return Choice(f"cuda:{(gpu_id or 0) if index is None else index}", fact if name == "auto" else "asked for")


def cores(root: Path = CGROUPS, membership: Path = _MEMBERSHIP) -> int:
    """Return how many cores this process may use.

    That is its CPU affinity, or the quota of its cgroup or of a parent where that is smaller, in both versions.
    """
    usable = len(os.sched_getaffinity(0))
    for controller, names in _QUOTA.items():
        for folder in cgroups(controller, root, membership):
            try:
                limit, period = (int(number) for name in names for number in (folder / name).read_text().split())
            except (OSError, ValueError):
                # The file is missing, or says "max": no quota.
                continue
            if limit > 0 and period > 0:
                usable = min(usable, -(-limit // period))
    return max(1, usable)


def cgroups(controller: str, root: Path = CGROUPS, membership: Path = _MEMBERSHIP) -> Iterator[Path]:
    """Yield the folders of this process's cgroup and of its parents, the innermost first, `root`'s own last.

    `controller` is one of version 1, such as `cpu`, or empty for version 2.
    """
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        lines = []
    top = root / controller
    # In a container the path may be the host's, whose folders are missing here; the top folder exists.
    inside = next((path for _, names, path in lines if controller in names.split(",")), "/").strip("/")
    yield from (top / inside, *list((top / inside).parents)[: len(Path(inside).parts)])
