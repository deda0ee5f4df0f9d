"""Reading an archive that nobody trusts yet: what is in it, and unpacking it, within limits."""

from __future__ import annotations

import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from beeline.errors import ArchiveError

MANIFEST = "MAR-INF/MANIFEST.json"
MAX_FILES = 2_000
MAX_BYTES = 4 << 30
# Deflate reaches 1032 to 1 on zeros; weights, code and pictures stay below 10 to 1.
MAX_RATIO = 100
_SMALL = 1 << 20
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_END = struct.Struct("<4s4H2IH")
# What the standard library raises for files that are cut off or had bytes changed, in 1,500 tries.
_BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, ValueError, NotImplementedError)
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\:]")


@contextmanager
def opened(mar: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive for reading, after every name, size and type in it was judged.

    Raises:
        ArchiveError: naming the first entry that is unsafe, or how the file is broken.
    """
    if not mar.is_file():
        raise ArchiveError(f"the archive {mar} is missing; build it with `beeline archive build`, or name another")
    try:
        with zipfile.ZipFile(mar) as archive:
            _judge(mar, archive)
            yield archive
    except _BROKEN as error:
        size = mar.stat().st_size
        raise ArchiveError(
            f"{mar} is cut off, damaged or no archive ({size} bytes, {error}); copy or build it again"
        ) from error


def unpack(mar: Path, folder: Path) -> None:
    """Unpack an archive into `folder`, which must be empty.

    Raises:
        ArchiveError: as `opened`; nothing outside `folder` is ever touched.
    """
    with opened(mar) as archive:
        for info in archive.infolist():
            target = folder / info.filename
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as source, target.open("xb") as file:
                _copy(source, file)


def read(archive: zipfile.ZipFile, name: str, mar: Path) -> bytes:
    """Return one entry's bytes.

    Raises:
        ArchiveError: when there is no such entry.
    """
    try:
        return archive.read(name)
    except KeyError as error:
        raise ArchiveError(f"{mar} holds no {name}; build it with `beeline archive build`") from error


def _copy(source: IO[bytes], file: IO[bytes]) -> None:
    while piece := source.read(1 << 20):
        file.write(piece)


def _judge(mar: Path, archive: zipfile.ZipFile) -> None:
    entries = archive.infolist()
    if len(entries) > MAX_FILES:
        raise ArchiveError(f"{mar} holds {len(entries)} files; the limit is {MAX_FILES}: it is no archive of a model")
    total = sum(info.file_size for info in entries)
    if total > MAX_BYTES:
        raise ArchiveError(f"{mar} would unpack to {total} bytes; the limit is {MAX_BYTES}: it was not unpacked")
    seen: set[str] = set()
    for info in entries:
        reason = _reason_against(info, seen)
        if reason:
            raise ArchiveError(f"{mar} holds {info.filename!r}, which {reason}; nothing of it was unpacked")
        seen.add(info.filename)
    for name in seen:
        parents = {str(parent) for parent in Path(name).parents}
        if both := sorted(parents & seen):
            raise ArchiveError(f"{mar} holds {both[0]!r} as a file and as a folder; nothing of it was unpacked")
    _check_no_hidden_bytes(mar, archive)


def _reason_against(info: zipfile.ZipInfo, seen: set[str]) -> str | None:
    name = info.filename
    parts = name.split("/")
    mode = info.external_attr >> 16
    if name != info.orig_filename or _UNSAFE.search(name):
        return "has a forbidden character in its name"
    if name.startswith("/") or any(part in ("", ".", "..") for part in parts):
        return "leads out of its folder or is no file"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        return "is a link or a special file"
    if name in seen:
        return "is there twice"
    if info.flag_bits & 0x1 or info.compress_type not in _METHODS:
        return "is encrypted or packed with a method that servers cannot read"
    if info.file_size > _SMALL and info.file_size > MAX_RATIO * max(1, info.compress_size):
        return f"unpacks from {info.compress_size} to {info.file_size} bytes"
    return None


def _check_no_hidden_bytes(mar: Path, archive: zipfile.ZipFile) -> None:
    """Let the entries cover the file without a gap, and their two headers say the same.

    The servers read a zip file from its front, Python reads it from the directory at its end: what only
    one of them sees would be verified by nobody and loaded all the same.
    """
    expected = 0
    with mar.open("rb") as file:
        for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
            file.seek(info.header_offset)
            header = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            signature, _, flags, method, _, _, crc, packed, size, name_length, extra_length = header
            name = file.read(name_length)
            same = (crc, packed, size) == (info.CRC, info.compress_size, info.file_size)
            same = same and (method, flags) == (info.compress_type, info.flag_bits)
            if info.header_offset != expected or signature != b"PK\x03\x04" or flags & 0x8 or not same:
                raise ArchiveError(
                    f"{mar} holds bytes around {info.filename!r} that its directory does not list; it was changed or "
                    "written by another tool: build it with `beeline archive build`"
                )
            if name != info.filename.encode("utf-8"):
                raise ArchiveError(f"{mar} names {info.filename!r} differently in its directory; build it again")
            expected = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length + packed
        file.seek(-_END.size, 2)
        end = file.tell()
        signature, *disks, directory_size, directory, comment = _END.unpack(file.read(_END.size))
    entries = len(archive.infolist())
    whole = directory == expected and directory + directory_size == end and disks == [0, 0, entries, entries]
    if signature != b"PK\x05\x06" or not whole or comment:
        raise ArchiveError(f"{mar} holds bytes that belong to no file of it; build it with `beeline archive build`")
