"""What a worker reads of its environment and machine: limits, threads, device, cores; each choice has a reason."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from beeline.errors import ConfigError

MAX_BYTES = 20_000_000
MAX_PIXELS = 50_000_000

# Where cgroups are mounted, and where this process's own are listed.
CGROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Version 2 has both numbers of a quota in one file, version 1 each in its own.
_QUOTA = {"": ("cpu.max",), "cpu": ("cpu.cfs_quota_us", "cpu.cfs_period_us")}


@dataclass(frozen=True)
class Choice:
    """A value that was chosen automatically, and why."""

    value: str
    reason: str


@dataclass(frozen=True)
class Limits:
    """The most bytes and pixels that one picture may have; the launcher sets both from one setting."""

    max_bytes: int = MAX_BYTES
    max_pixels: int = MAX_PIXELS

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Limits:
        """Read `BEELINE_MAX_BYTES` and `BEELINE_MAX_PIXELS`.

        Raises:
            ConfigError: when either is no whole number over 0.
        """
        return cls(
            positive(environ, "BEELINE_MAX_BYTES", MAX_BYTES), positive(environ, "BEELINE_MAX_PIXELS", MAX_PIXELS)
        )


def positive(environ: Mapping[str, str], name: str, default: int) -> int:
    """Return the environment variable `name` as a whole number over 0, or `default` where it is not set.

    Raises:
        ConfigError: naming the variable and its value.
    """
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


def lone_threads_of(threads: int, environ: Mapping[str, str]) -> Choice:
    """Return how many threads the forward pass of a lone picture takes, over the worker's own share of the cores.

    Where requests queue, batches are larger and a worker keeps to its own share. On two cores, with two workers and
    ResNet-18 in int8, one client waits 25 ms instead of 38, and 50 clients get the same requests/s.
    """
    if not environ.get("BEELINE_LONE_THREADS"):
        return Choice(str(threads), "no BEELINE_LONE_THREADS: as many as a batch")
    asked = positive(environ, "BEELINE_LONE_THREADS", 1)
    if asked <= threads:
        return Choice(str(threads), "as many as a batch")
    return Choice(str(asked), "BEELINE_LONE_THREADS")


def parsed_device(asked: str) -> tuple[str, int | None]:
    """Return `auto`, `cpu` or `cuda`, and of `cuda:<index>` the index.

    Raises:
        ConfigError: for anything else.
    """
    name, colon, index = asked.partition(":")
    if name not in ("auto", "cpu", "cuda") or (colon and (name != "cuda" or not index.isdecimal())):
        raise ConfigError(f"BEELINE_DEVICE is {asked!r}; allowed: auto, cpu, cuda or cuda:<index>")
    return name, int(index) if index else None


def on_cpu(asked: str, engine: str) -> Choice:
    """Return the device of an engine that runs only on CPUs.

    Raises:
        ConfigError: where another one is asked for.
    """
    if asked not in ("auto", "cpu"):
        raise ConfigError(
            f"BEELINE_DEVICE is {asked!r}, and this archive's engine, {engine}, runs on CPUs: use auto or cpu, or "
            "build the archive with --engine torch"
        )
    return Choice("cpu", f"{engine} runs on CPUs" if asked == "auto" else "asked for")


def cores(root: Path = CGROUPS, membership: Path = _MEMBERSHIP) -> int:
    """Return how many cores this process may use: its CPU affinity, or the quota of its cgroup or a parent if smaller.

    Both versions of cgroups are read.
    """
    usable = len(os.sched_getaffinity(0))
    for controller, names in _QUOTA.items():
        for folder in cgroups(controller, root, membership):
            try:
                limit, period = (int(number) for name in names for number in (folder / name).read_text().split())
            except (OSError, ValueError):
                # Not there, or "max": no quota.
                continue
            if limit > 0 and period > 0:
                usable = min(usable, -(-limit // period))
    return max(1, usable)


def cgroups(controller: str, root: Path = CGROUPS, membership: Path = _MEMBERSHIP) -> Iterator[Path]:
    """Yield the folders of this process's cgroup and of its parents, the innermost first, `root`'s own last.

    Args:
        controller: of version 1, such as `cpu`; empty for version 2.
        root: where cgroups are mounted.
        membership: the process's list of its cgroups, as the kernel writes it.
    """
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        lines = []
    top = root / controller
    # In a container the path may be the host's, whose folders are missing here; the top folder exists.
    inside = next((path for _, names, path in lines if controller in names.split(",")), "/").strip("/")
    yield from (top / inside, *list((top / inside).parents)[: len(Path(inside).parts)])
