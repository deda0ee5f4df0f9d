"""Files on this machine: digests, whole writes, JSON, and locks between processes."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from beeline.files import SHORT, sha256, write_whole

__all__ = ["SHORT", "is_locked", "locked", "sha256", "try_lock", "write_json", "write_whole"]


def write_json(path: Path, values: Any, mode: int | None = None, sync: bool = False) -> None:
    """Write `values` as indented UTF-8 JSON with a final newline; see `write_whole`.

    Raises:
        ValueError: for a number that JSON has no word for, such as NaN. OSError: as `write_whole`.
    """
    write_whole(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n", mode, sync)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` for the block; wait for whoever holds it.

    The kernel releases it whatever ends the process.

    Raises:
        OSError: when the file cannot be made.
    """
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def try_lock(path: Path, mode: int = 0o666) -> int | None:
    """Take the lock file `path`, which is made where it is missing, without waiting.

    Args:
        path: in an existing folder.
        mode: the permissions of a new file, less the umask. Who may read it may hold it against everybody.

    Returns:
        The descriptor that holds it until it is closed, in this process and in all that inherit it; None when
        it is held already.

    Raises:
        OSError: when the file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor


def is_locked(path: Path) -> bool:
    """Return whether somebody holds the lock file `path`; a missing one is held by nobody.

    Raises:
        OSError: when the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            # Shared, so that two that ask at once do not take each other for a holder.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
