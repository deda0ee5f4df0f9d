"""The sha256 of a file, read in pieces."""

from __future__ import annotations

import hashlib
from pathlib import Path

SHORT = 12


def file_sha256(path: Path) -> str:
    """Return the sha256 of the file's bytes, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
