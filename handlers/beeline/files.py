"""Files: the sha256 of one, and one written so that no reader sees a part of it."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

# Digits of a digest that a message shows.
SHORT = 12


def sha256(path: Path) -> str:
    """Return the sha256 of the file's bytes, 64 hexadecimal digits; the file is read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_whole(path: Path, content: str | bytes, mode: int | None = None, sync: bool = False) -> None:
    """Write a file, in an existing folder, so that a reader sees the old one or the new one, never a part.

    Text is written as UTF-8. `mode` are the permissions; None leaves them to the umask. With `sync` the content is on
    the disk before the old file goes, so that a machine that loses its power keeps one of the two.

    Raises:
        OSError: when the folder cannot be written; the old file is still there then.
    """
    # Named after process and thread, so that two writers never share a draft.
    draft = path.with_name(f".{path.name}-{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        if mode is not None:
            draft.chmod(mode)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
