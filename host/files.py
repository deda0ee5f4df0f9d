"""Files on this machine: digests, whole writes, JSON, and locks between processes."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from beeline.files import SHORT, sha256, write_whole

__all__ = ["SHORT", "locked", "sha256", "write_json", "write_whole"]


def write_json(path: Path, values: Any, mode: int | None = None) -> None:
    """Write `values` as indented UTF-8 JSON with a final newline; see `write_whole`."""
    write_whole(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n", mode)


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
