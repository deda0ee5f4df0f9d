"""Untrusted zip files: checked entry by entry, then read or unpacked within limits."""

from __future__ import annotations

import re
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# What the standard library raised in 1,500 tries with truncated files and changed bytes; RuntimeError is encryption.
BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, ValueError, RuntimeError)
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\\:]")
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_END = struct.Struct("<4s4H2IH")
# ZIP64, from 2 GiB on: a header's sizes are in its extra field, and 76 bytes follow the directory.
_FULL = 0xFFFFFFFF
_SIZES = struct.Struct("<2H2Q")
_END_64 = struct.Struct("<4sQ2H2I4Q4sIQI")


@dataclass(frozen=True)
class Rules:
    """The limits for a zip file, and the error for one that exceeds them."""

    error: type[Exception]
    fix: str  # what to do about a damaged file
    max_files: int  # with folders
    max_bytes: int  # unpacked
    max_ratio: int  # unpacked bytes for each packed byte
    plain: bool = False  # whether it must hold only files, the same ones for a reader from its front and from its end


@contextmanager
def opened(path: Path, rules: Rules) -> Iterator[zipfile.ZipFile]:
    """Open a zip file after a check of every name, size and type in it; raise `rules.error` for the first fault."""
    try:
        with zipfile.ZipFile(path) as opened_zip:
            _judge(path, opened_zip, rules)
            yield opened_zip
    except BROKEN as error:
        size = path.stat().st_size if path.exists() else 0
        what = f"is cut off, damaged or no zip file and cannot be unpacked ({size} bytes, {error})"
        raise rules.error(f"{path} {what}; {rules.fix}") from error


def unpack(path: Path, folder: Path, rules: Rules) -> None:
    """Unpack a zip file's files into `folder`, which must be empty; `opened` checks all before the first write."""
    with opened(path, rules) as source:
        for info in source.infolist():
            if info.is_dir():
                continue
            target = folder / info.filename
            target.parent.mkdir(parents=True, exist_ok=True)
            # The library reads at most the declared size, then compares the checksum.
            with source.open(info) as reader, target.open("xb") as writer:
                shutil.copyfileobj(reader, writer, 1 << 20)


def _judge(path: Path, opened_zip: zipfile.ZipFile, rules: Rules) -> None:
    entries = opened_zip.infolist()
    if len(entries) > rules.max_files:
        raise rules.error(f"{path} holds {len(entries)} entries; the limit is {rules.max_files}")
    nothing = "; nothing of it was unpacked"
    if sum(info.file_size for info in entries) > rules.max_bytes:
        raise rules.error(f"{path} unpacks to more than the limit of {rules.max_bytes} bytes{nothing}")
    files: set[str] = set()
    folders: set[str] = set()
    for info in entries:
        if reason := _reason_against(info, rules):
            raise rules.error(f"{path} holds {info.filename!r}, which {reason}{nothing}")
        # Without case, because names that differ only in case are one file on some systems.
        folded = info.filename.casefold()
        if folded in files:
            raise rules.error(f"{path} holds {info.filename!r} twice{nothing}")
        if not info.is_dir():
            files.add(folded)
        while (folded := folded.rpartition("/")[0]) and folded not in folders:
            folders.add(folded)
    if both := sorted(files & folders):
        raise rules.error(f"{path} holds {both[0]!r} as a file and as a folder{nothing}")
    if rules.plain:
        _check_no_hidden_bytes(path, opened_zip, rules)


def _reason_against(info: zipfile.ZipInfo, rules: Rules) -> str | None:
    name, kind = info.filename, stat.S_IFMT(info.external_attr >> 16)
    parts = PurePosixPath(name).parts
    # The raw name too: zipfile cuts names at a NUL, and turns backslashes into slashes only on Windows.
    raw = info.orig_filename
    if not parts or "\0" in raw or "\\" in raw or ".." in parts or name.startswith("/") or ":" in parts[0]:
        return "points outside the folder it is unpacked into"
    if rules.plain and (_FORBIDDEN.search(name) or not {"", "."}.isdisjoint(name.split("/"))):
        return "has a forbidden character in its name or is no file"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    if info.flag_bits & 0x1:
        return "is encrypted"
    if rules.plain and info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is packed with a method that servers cannot read"
    packed = max(1, info.compress_size)
    # Text files of less than a MiB may compress very well.
    if info.file_size > max(1 << 20, rules.max_ratio * packed):
        return f"claims to grow {info.file_size // packed}-fold"
    return None


def _check_no_hidden_bytes(path: Path, opened_zip: zipfile.ZipFile, rules: Rules) -> None:
    """Check that the entries cover the file without a gap, and that the two headers of each entry agree.

    The servers read a zip file from its front, Python from the directory at its end. Without this check a server could
    load what Python never verified.
    """
    expected = 0
    with path.open("rb") as file:
        for info in sorted(opened_zip.infolist(), key=lambda info: info.header_offset):
            file.seek(info.header_offset)
            header = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            signature, _, flags, method, _, _, *sizes, name_length, extra_length = header
            name, extra = file.read(name_length), file.read(extra_length)
            if sizes[1:] == [_FULL, _FULL] and extra_length == _SIZES.size and extra[:4] == b"\1\0\x10\0":
                _, _, size, packed = _SIZES.unpack(extra)
                sizes[1:] = packed, size
            listed = [info.flag_bits, info.compress_type, info.CRC, info.compress_size, info.file_size]
            is_listed = info.header_offset == expected and [flags, method, *sizes] == listed
            if not is_listed or signature != b"PK\x03\x04" or flags & 0x8:
                what = f"holds bytes around {info.filename!r} that its directory does not list"
                raise rules.error(f"{path} {what}; it was changed or written by another tool: {rules.fix}")
            if name != info.filename.encode("utf-8"):
                raise rules.error(f"{path} names {info.filename!r} differently in its directory; {rules.fix}")
            expected = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length + info.compress_size
        file.seek(-_END.size, 2)
        end = file.tell()
        signature, *disks, directory_size, directory, comment = _END.unpack(file.read(_END.size))
        file.seek(expected + directory_size)
        between = file.read(end - file.tell()) if file.tell() < end else b""
    entries = len(opened_zip.infolist())
    tail = _END_64.pack(
        *(b"PK\6\6", 44, 45, 45, 0, 0, entries, entries, directory_size, expected),
        *(b"PK\6\7", 0, expected + directory_size, 1),
    )
    is_whole = directory == min(expected, _FULL) and disks == [0, 0, entries, entries]
    is_whole = is_whole and expected + directory_size + len(between) == end and between in (b"", tail)
    if signature != b"PK\x05\x06" or not is_whole or comment:
        raise rules.error(f"{path} holds bytes that belong to no file of it; {rules.fix}")
