"""An instance's processes: found through /proc by the mark in their environment or their folder, and stopped."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1
# A worker that is told to end is given this long, in seconds.
GRACE = 5.0


def marked(variable: str, prefix: str, folder: Path | None = None) -> list[psutil.Process]:
    """Return the live processes whose environment has `variable` with a value that begins with `prefix`.

    And those that work in `folder` or below it: nginx writes its title over its environment.
    """
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get(variable, "").startswith(prefix)
            ours = ours or (folder is not None and folder in (inside := Path(process.cwd()), *inside.parents))
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            # It ended meanwhile, or belongs to somebody else: then it is none of ours.
            continue
    return found


def stop_marked(variable: str, prefix: str, grace: float = GRACE, folder: Path | None = None) -> list[int]:
    """Stop every process with the mark: SIGTERM, `grace` seconds, SIGKILL; until none is left.

    Only what carries the mark, or works in our own temporary folder, is ever touched: a process id alone
    may have gone to somebody else.

    Returns:
        The ids of the processes that were found.
    """
    stopped: set[int] = set()
    deadline = time.monotonic() + grace
    while found := marked(variable, prefix, folder):
        overdue = time.monotonic() > deadline
        for process in found:
            try:
                if overdue:
                    process.kill()
                elif process.pid not in stopped:
                    process.terminate()
            except psutil.NoSuchProcess:
                continue
            stopped.add(process.pid)
        psutil.wait_procs(found, timeout=0.1)
    return sorted(stopped)


def ending_with_parent(number: signal.Signals) -> Callable[[], None]:
    """Return what a child is to call before its program starts: the kernel sends it `number` when its parent dies."""
    return functools.partial(end_with, os.getpid(), number)


def end_with(parent: int, number: signal.Signals) -> None:
    """Ask the kernel for `number` when the parent dies, even by SIGKILL; end now if it died already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
