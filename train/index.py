"""What is known of each file of a picture folder: digest and damage, read again only when the file changes."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from beeline import formats, pixels
from beeline.errors import RequestError
from beeline.settings import MAX_PIXELS
from beeline.spec import Geometry
from host import ROOT, Say
from host.files import write_whole
from host.machine import cores
from train.progress import progress

FOLDER = ROOT / ".beeline" / "data" / "index"
# A JPEG of more pixels than a worker takes is scaled while it is decoded; Pillow itself refuses more than these.
MOST_PIXELS = 2 * MAX_PIXELS
_SETS = 16
_FRESH_NS = 2_000_000_000
# The smallest decoding: all bytes of a JPEG are read, and an eighth of its lines made.
_GLANCE = Geometry(8, 8, decoding="scaled")


class Fact(NamedTuple):
    """A file's sha256, its format by its first bytes ("" for no picture), and why it cannot be decoded, or ""."""

    sha256: str
    kind: str
    fault: str = ""


def most_pixels(data: bytes) -> int:
    """Return how many pixels a picture of these bytes may have in training."""
    return MOST_PIXELS if formats.kind_of(data) == "JPEG" else MAX_PIXELS


def examine(root: Path, paths: Sequence[Path], say: Say) -> dict[Path, Fact]:
    """Return a fact for each file, from the index of `root` where size and time are those of the last reading.

    The 16 indexes that were used last are kept, none with files that are gone.
    """
    kept = FOLDER / f"{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]}.json"
    reader, begun = f"{pixels.GEOMETRY} {formats.pillow_version()} {formats.READS_HEIC} {MOST_PIXELS}", time.time_ns()
    known: dict[str, list[object]] = {}
    with suppress(OSError, ValueError, KeyError, TypeError):
        values = json.loads(kept.read_text(encoding="utf-8"))
        known = values["files"] if values["reader"] == reader else {}
    stamps = {path: _stamp(path) for path in paths}
    lines = {path: known.get(str(path), []) for path in paths}
    facts = {path: Fact(*map(str, line[2:])) for path, line in lines.items() if line and line[:2] == stamps[path]}
    missing = [path for path in paths if path not in facts]
    with ThreadPoolExecutor(cores()) as pool, progress("reading pictures", len(missing), say, "files") as step:
        for done, (path, fact) in enumerate(zip(missing, pool.map(_read, missing), strict=True), 1):
            facts[path] = fact
            step(done)
    # A file that has only just changed may change again at the same time, as the file system counts it.
    sure = [path for path in paths if facts[path].sha256 and begun - stamps[path][1] > _FRESH_NS]
    files = {str(path): [*stamps[path], *facts[path]] for path in sure}
    files |= {name: line for name, line in known.items() if name not in files and Path(name).exists()}
    # A full disk costs only the next reading.
    with suppress(OSError):
        if files != known:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_whole(kept, json.dumps({"reader": reader, "files": files}))
        for old in sorted(FOLDER.glob("*.json"), key=os.path.getmtime)[:-_SETS]:
            old.unlink()
    return facts


def _stamp(path: Path) -> list[int]:
    """Return size and time of change; -1 of a file that is not there."""
    with suppress(OSError):
        status = path.stat()
        return [status.st_size, status.st_mtime_ns]
    return [-1, -1]


def _read(path: Path) -> Fact:
    """Read a file once, for its digest and all that its decoder says; of other files than pictures the first bytes."""
    try:
        with path.open("rb") as file:
            data = file.read(32)
            kind = formats.kind_of(data) or ""
            data += file.read() if kind else b""
        pixels.decode(data, _GLANCE, most_pixels(data))
    except OSError as error:
        return Fact("", "", error.strerror or str(error))
    except RequestError as error:
        return Fact(hashlib.sha256(data).hexdigest(), kind, str(error))
    return Fact(hashlib.sha256(data).hexdigest(), kind)
