"""Unpack a zip file that was downloaded: nothing leaves the folder, nothing grows without bound."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

from host import zips
from train.errors import UnsafeArchive

MAX_BYTES = 4 << 30
MAX_FILES = 200_000
# Photographs hardly shrink; deflate's own ceiling is 1032.
MAX_RATIO = 200


def unzip(archive: Path, folder: Path, max_bytes: int = MAX_BYTES, max_files: int = MAX_FILES) -> Path:
    """Unpack `archive` as `folder`, which appears whole or not at all; an older one is replaced.

    Raises:
        UnsafeArchive: a damaged zip file, a name outside the folder, a link, a file that is encrypted,
            doubled or unlike its declared size, more than `max_files` files or `max_bytes` bytes.
    """
    rules = zips.Rules(UnsafeArchive, "delete it and download it again", max_files, max_bytes, MAX_RATIO)
    fresh = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    fresh.mkdir(parents=True)
    try:
        zips.unpack(archive, fresh, rules)
        if folder.exists():
            shutil.rmtree(folder)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder
