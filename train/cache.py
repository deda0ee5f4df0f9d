"""Decoded pictures on disk, so that later epochs and runs decode nothing; bounded, and dropped when a file changes."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from host import ROOT
from host.files import write_whole

FOLDER = ROOT / ".beeline" / "pictures"
# Height, width, the source's bytes and modification time in nanoseconds, and the CRC-32 of the pixels.
_HEAD = struct.Struct("<IIQqI")
# Of what the disk has free the cache takes at most this share.
_SHARE_OF_FREE = 0.5


class Cache:
    """Pixels by picture and kind, in a file each; at most `limit` bytes in `folder`, of which 0 keeps nothing.

    What was not used for longest is removed when a cache is opened. While it is in use nothing is removed: an epoch
    reads all pictures in turn, and each would push out one that is needed sooner. Loader processes share what is left.
    """

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        # In shared memory, since the processes of a loader are new in each epoch.
        self._folder, self._left, self._used = folder or FOLDER, multiprocessing.Value("q", 0), limit > 0
        if self._used:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._left.value = self._make_room(limit)

    def get(self, path: Path, kind: str, decode: Callable[[bytes], NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Return `decode` of the bytes of `path`, uint8 `[H, W, 3]`, from the disk if the file is as it was.

        `kind` says what `decode` does. Raise what it raises, or `OSError` where the picture cannot be read.
        """
        if not self._used:
            return decode(path.read_bytes())
        status = path.stat()
        name = hashlib.sha256(f"{path.absolute()}\n{kind}".encode()).hexdigest()[:32]
        entry = self._folder / name
        with suppress(OSError, ValueError, struct.error):
            content = entry.read_bytes()
            high, wide, size, changed, checksum = _HEAD.unpack_from(content)
            pixels = np.frombuffer(content, np.uint8, offset=_HEAD.size).reshape(high, wide, 3)
            if (size, changed) == (status.st_size, status.st_mtime_ns) and zlib.crc32(
                memoryview(content)[_HEAD.size :]
            ) == checksum:
                return pixels
        pixels = decode(path.read_bytes())
        if self._takes(pixels.nbytes):
            content = pixels.tobytes()
            head = _HEAD.pack(*pixels.shape[:2], status.st_size, status.st_mtime_ns, zlib.crc32(content))
            # A full disk costs time and no picture.
            with suppress(OSError):
                write_whole(entry, head + content)
        return pixels

    def _takes(self, size: int) -> bool:
        """Say whether there is room for so many bytes, and take it."""
        with self._left.get_lock():
            has_room = size <= self._left.value
            self._left.value -= size if has_room else 0
        return bool(has_room)

    def _make_room(self, limit: int) -> int:
        """Remove the oldest files over nine tenths of `limit`; return the bytes that may be written."""
        entries = []
        for each in os.scandir(self._folder):
            # Another training writes and removes files here, too.
            with suppress(FileNotFoundError):
                entries.append((each.stat(), each.path))
        held = sum(status.st_size for status, _ in entries)
        limit = min(limit, held + int(shutil.disk_usage(self._folder).free * _SHARE_OF_FREE))
        for status, path in sorted(entries, key=lambda entry: max(entry[0].st_atime_ns, entry[0].st_mtime_ns)):
            if held <= limit * 0.9:
                break
            with suppress(FileNotFoundError):
                Path(path).unlink()
            held -= status.st_size
        return limit - held
