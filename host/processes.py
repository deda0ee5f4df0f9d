"""Processes: children that end with everything they started, and marked processes of this machine."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1
# Seconds between SIGTERM and SIGKILL.
GRACE = 5.0


def start_group(
    command: Sequence[str], log: Path, folder: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start a child that leads its own session, and so its own process group; `end_group` ends it.

    Its stdin and stdout are pipes, its stderr is the new file `log`, `folder` its working directory. It gets SIGKILL
    when the calling thread ends, however that happens.
    """
    with log.open("wb") as stderr:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            cwd=folder,
            env=environment,
            start_new_session=True,
            preexec_fn=ending_with_parent(signal.SIGKILL),
        )


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the process group of a child, which may have ended before the others; wait for it and close its pipes."""
    # The kernel does not reuse the id of a group that has members. So where another process has the id of a child that
    # was waited for, the group is empty.
    if process.returncode is None or not psutil.pid_exists(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            # Data that was not flushed has no reader any more.
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def marked(variable: str = "", prefix: str = "-", folder: Path | None = None) -> list[psutil.Process]:
    """Return the live processes with a `variable` that begins with `prefix`, or at work in `folder` or below.

    Raise ValueError for an empty prefix, which every process of the machine has, and for the root as `folder`.
    """
    if not prefix or folder == Path("/"):
        raise ValueError(f"prefix {prefix!r} and folder {folder} would mean every process")
    # The folder, because nginx writes its title over its environment.
    found = []
    for process in psutil.process_iter():
        # Another user's process, or one that has just ended, is not ours.
        with contextlib.suppress(psutil.Error, OSError):
            is_ours = process.environ().get(variable, "").startswith(prefix)
            is_ours = is_ours or (folder is not None and Path(process.cwd()).is_relative_to(folder))
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def stop_marked(
    variable: str, prefix: str, grace: float = GRACE, folder: Path | None = None, spared: AbstractSet[int] = frozenset()
) -> list[int]:
    """Stop every process that `marked` finds but `spared`: SIGTERM, `grace` seconds, SIGKILL. Return the ids of all.

    A recorded process id is not enough, because the kernel may have given it to another program.
    """
    stopped: set[int] = set()
    deadline = time.monotonic() + grace
    while found := [each for each in marked(variable, prefix, folder) if each.pid not in spared]:
        overdue = time.monotonic() > deadline
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                if overdue:
                    process.kill()
                elif process.pid not in stopped:
                    process.terminate()
                stopped.add(process.pid)
        psutil.wait_procs(found, timeout=0.1)
    return sorted(stopped)


def ending_with_parent(number: signal.Signals) -> Callable[[], None]:
    """Return a `preexec_fn`: the kernel sends `number` to the child when this process dies."""
    return functools.partial(end_with, os.getpid(), number)


def end_with(parent: int, number: signal.Signals) -> None:
    """Ask the kernel to send `number` when the parent dies, even by SIGKILL; end now if it has already died."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
