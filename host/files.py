"""Files on this machine: digests, whole files and folders, JSON, and locks between processes."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from beeline.errors import BeelineError
from beeline.files import SHORT, sha256, write_whole
from host import Say, silent

__all__ = ["SHORT", "is_locked", "locked", "sha256", "try_lock", "whole_folder", "write_json", "write_whole"]

# Endings of the files that a worker takes.
PICTURES = (".jpg", ".jpeg", ".jfif", ".png", ".gif", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".mpo")
# What NAS, macOS and Windows leave in folders of pictures: thumbnails, copies, recycle bins.
_LEFT_BEHIND = ("@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "__MACOSX", "__pycache__", "Thumbs.db", "desktop.ini")
# Why `walk` names a file that nobody can read.
HIDDEN, BROKEN, CIRCLE = "hidden", "it leads to no file", "a link back to a folder around it"
# Of renameat2(2).
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def write_json(path: Path, values: Any, mode: int | None = None, sync: bool = False) -> None:
    """Write `values` as indented UTF-8 JSON, as `write_whole` does; raise ValueError for NaN and infinite numbers."""
    write_whole(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n", mode, sync)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden, or was left behind by a system: `.x`, `__MACOSX`, `@eaDir`."""
    return name.startswith(".") or name in _LEFT_BEHIND


def walk(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[tuple[Path, str]]:
    """Yield all files below a folder by name, each with "" or why it cannot count; links are followed, not in circles.

    A hidden folder is yielded as one path. Raise OSError for a folder that cannot be read.
    """
    above = (*above, folder.resolve())
    for path in sorted(folder.iterdir()):
        if is_hidden(path.name):
            yield path, HIDDEN
        elif not path.is_dir():
            yield path, "" if path.is_file() else BROKEN
        elif path.resolve() in above:
            yield path, CIRCLE
        else:
            yield from walk(path, above)


def find_pictures(given: Sequence[Path], say: Say = silent) -> list[Path]:
    """Return the given files, and the pictures in the given folders by name; raise `BeelineError` if there are none.

    In a folder a file is a picture by its ending or its first bytes. `say` is told what is left out. What cannot be
    read, as a link that leads nowhere, stays if its ending is a picture's.
    """
    pictures: list[Path] = []
    for path in given:
        if path.is_dir():
            files = list(walk(path))
            taken = [each for each, why in files if _is_picture(each, why)]
            pictures += taken
            if rest := sorted({each for each, _ in files} - set(taken)):
                say(f"{path}: left out, hidden or no pictures: {listed(rest)}")
        elif path.is_file() or path.is_symlink():
            pictures.append(path)
        else:
            raise BeelineError(f"{path} is not there; name a picture or a folder of pictures")
    if not pictures:
        names = ", ".join(map(str, given))
        raise BeelineError(f"no picture below {names}; known endings are {', '.join(PICTURES)}")
    return pictures


def listed(names: Sequence[object], most: int = 3) -> str:
    """Return the first names in words: `a, b, c and 4 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def _is_picture(path: Path, why: str) -> bool:
    if why or path.suffix.lower() in PICTURES:
        return why in ("", BROKEN) and path.suffix.lower() in PICTURES
    from beeline.formats import kind_of  # It imports Pillow, which most processes that use files do not need.

    try:
        with path.open("rb") as file:
            return kind_of(file.read(16)) is not None
    except OSError:
        return False


def check_writable(folder: Path) -> None:
    """Raise `BeelineError` unless files can be made in `folder`, which may be missing."""
    nearest = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        why = "is read-only for you" if nearest.is_dir() else "is a file"
        raise BeelineError(f"nothing can be written into {folder}, since {nearest} {why}; name another folder")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder, which replaces `target` in one step when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        fresh = Path(scratch) / "fresh"
        fresh.mkdir()
        yield fresh
        _put_in_place(fresh, target)


def _put_in_place(fresh: Path, target: Path) -> None:
    """Rename `fresh` to `target`; an old `target` gets the name `fresh`, or `old` in the same folder."""
    try:
        # Works only if `target` is missing or an empty folder.
        fresh.rename(target)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if exchange is None or exchange(_AT_FDCWD, os.fsencode(fresh), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE):
        # This file system cannot exchange two names, so for a moment `target` is missing.
        old = fresh.with_name("old")
        target.rename(old)
        try:
            fresh.rename(target)
        except BaseException:
            old.rename(target)
            raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the lock file `path` and hold it for the block; the kernel releases it however the process ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def try_lock(path: Path, mode: int = 0o666) -> int | None:
    """Take the lock file `path` without waiting; create the file if it is missing.

    Returns:
        The descriptor, which holds the lock until all processes that have it have closed it; None if the lock is taken.
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
    """Return whether a process holds the lock file `path`; False if there is no such file."""
    try:
        with path.open("rb") as file:
            # A shared lock, so that two processes that check at once do not see each other as the holder.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
