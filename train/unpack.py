"""Unpack a zip file that came from outside: nothing leaves the folder, nothing grows without bound."""

from __future__ import annotations

import shutil
import stat
import uuid
import zipfile
from pathlib import Path, PurePosixPath

from train.errors import UnsafeArchive

MAX_BYTES = 4 << 30
MAX_FILES = 200_000
# Photographs hardly shrink; deflate's own ceiling is 1032. Small text files may compress very well.
MAX_RATIO = 200
_RATIO_FROM_BYTES = 1 << 20


def unzip(archive: Path, folder: Path, max_bytes: int = MAX_BYTES, max_files: int = MAX_FILES) -> Path:
    """Unpack `archive` as `folder`, which appears whole or not at all; an older one is replaced.

    Raises:
        UnsafeArchive: a damaged zip file, a name outside the folder, a link, a file that is encrypted,
            doubled or unlike its declared size, more than `max_files` files or `max_bytes` bytes.
    """
    fresh = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    fresh.mkdir(parents=True)
    try:
        try:
            with zipfile.ZipFile(archive) as opened:
                members = _judge(archive, opened.infolist(), max_bytes, max_files)
                for member in members:
                    _write(opened, member, fresh.joinpath(*PurePosixPath(member.filename).parts))
        except (zipfile.BadZipFile, EOFError, NotImplementedError, OSError, RuntimeError, ValueError) as error:
            raise UnsafeArchive(f"{archive} cannot be unpacked ({error}); delete it and download it again") from error
        if folder.exists():
            shutil.rmtree(folder)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def _judge(archive: Path, members: list[zipfile.ZipInfo], max_bytes: int, max_files: int) -> list[zipfile.ZipInfo]:
    """Check every entry before a single byte is written; return the files."""
    if len(members) > max_files:
        raise UnsafeArchive(f"{archive} holds {len(members)} entries; the limit is {max_files}")
    seen: set[str] = set()
    files, total = [], 0
    for member in members:
        name = member.filename
        if reason := _unsafe(member):
            raise UnsafeArchive(f"{archive} holds {name!r}, which {reason}; nothing of it was unpacked")
        if member.is_dir():
            continue
        # Compared without case: two such names would be one file on some systems.
        if name.casefold() in seen:
            raise UnsafeArchive(f"{archive} holds {name!r} twice; nothing of it was unpacked")
        seen.add(name.casefold())
        total += member.file_size
        if total > max_bytes:
            raise UnsafeArchive(
                f"{archive} unpacks to more than the limit of {max_bytes} bytes; nothing of it was unpacked"
            )
        files.append(member)
    return files


def _unsafe(member: zipfile.ZipInfo) -> str | None:
    """Say what is wrong with an entry, or None."""
    name, kind = member.filename, stat.S_IFMT(member.external_attr >> 16)
    # zipfile turns backslashes into slashes only on Windows, and cuts names at a NUL: look at the raw name too.
    raw = member.orig_filename
    parts = PurePosixPath(name).parts
    if not parts or "\0" in raw or "\\" in raw or ".." in parts or name.startswith("/") or ":" in parts[0]:
        return "points outside the folder it is unpacked into"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    if member.flag_bits & 0x1:
        return "is encrypted"
    if member.file_size > _RATIO_FROM_BYTES and member.file_size > MAX_RATIO * max(1, member.compress_size):
        return f"claims to grow {member.file_size // max(1, member.compress_size)}-fold"
    return None


def _write(opened: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    left = member.file_size
    with opened.open(member) as source, target.open("xb") as file:
        while piece := source.read(1 << 16):
            left -= len(piece)
            if left < 0:
                raise UnsafeArchive(f"{member.filename!r} unpacks to more bytes than it declares")
            file.write(piece)
