"""Processes that carry an instance's mark in their environment: found through /proc, and stopped."""

from __future__ import annotations

import time

import psutil

# A worker that is told to end is given this long, in seconds.
GRACE = 5.0


def marked(variable: str, prefix: str) -> list[psutil.Process]:
    """Return the live processes whose environment has `variable` with a value that begins with `prefix`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(variable, "").startswith(prefix) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            # It ended meanwhile, or belongs to somebody else: then it is none of ours.
            continue
    return found


def stop_marked(variable: str, prefix: str, grace: float = GRACE) -> list[int]:
    """Stop every process with the mark: SIGTERM, `grace` seconds, SIGKILL; until none is left.

    Only what carries the mark is ever touched: a process id alone may have gone to somebody else.

    Returns:
        The ids of the processes that were found.
    """
    stopped: set[int] = set()
    deadline = time.monotonic() + grace
    while found := marked(variable, prefix):
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
