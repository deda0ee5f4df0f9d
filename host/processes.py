"""Processes: children that end with all they start, and marked ones that are found through /proc and stopped."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1
# A worker that is told to end is given this long, in seconds.
GRACE = 5.0


def start_group(
    command: Sequence[str], log: Path, folder: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start a child that leads a session, and so a process group, of its own; `end_group` ends it.

    Its stdin and stdout are pipes, its stderr is the new file `log`. It gets SIGKILL when the thread that called
    this ends, whatever ends that.

    Args:
        command: the program and its arguments.
        log: where its stderr goes.
        folder: where it works.
        environment: all of it.

    Raises:
        OSError: when there is no such program, or `log` cannot be made.
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
    """Kill a child that leads a process group and all that it started in that, wait for it, and close its pipes.

    For one that was waited for too: what it started may live on.
    """
    # While somebody is left in the group its id is given to nobody else: a process with the id of a child that was
    # waited for means that nobody is.
    if process.returncode is None or not psutil.pid_exists(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            # What was not flushed to it yet finds nobody who reads.
            with contextlib.suppress(BrokenPipeError):
                stream.close()


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
