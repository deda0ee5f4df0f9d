"""Verify an archive: safe, whole, and answering its golden pictures in a clean worker process."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archive import mar as reader
from archive import store
from archive.sandbox import Sandbox
from beeline.answer import Answer
from beeline.errors import ArchiveError
from beeline.spec import GOLDEN, ModelSpec
from host.files import sha256


@dataclass(frozen=True)
class Verified:
    """A verified archive: its model, how many golden pictures agreed, the engine's choices and the seconds it took."""

    mar: Path
    sha256: str
    spec: ModelSpec
    server: str
    pictures: int
    choice: dict[str, list[str]]
    load_seconds: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "archive": str(self.mar),
            "sha256": self.sha256,
            "name": self.spec.name,
            "version": self.spec.version,
            "fingerprint": self.spec.fingerprint(),
            "server": self.server,
            "pictures": self.pictures,
            "choice": self.choice,
            "load_seconds": round(self.load_seconds, 3),
            "seconds": round(self.seconds, 3),
        }


def verify(mar: Path, server: str = "torchserve") -> Verified:
    """Check an archive from its zip headers to its answers, and stop at the first thing that does not hold.

    First the archive is safe to unpack, every file is as its record says, and the file is as the store's index says.
    Then a clean process loads it as `server` does, which replays the golden pictures on the engine. Last, the golden
    pictures are sent through the handler as requests.

    Raises:
        ArchiveError: one sentence naming the first thing that differs, with what was expected.
        Undetermined: when the handler gives no reply.
    """
    start = time.perf_counter()
    contents = reader.check(mar)
    digest = sha256(mar)
    if reason := store.changed(mar):
        raise ArchiveError(f"{mar} {reason}")
    with tempfile.TemporaryDirectory(prefix="beeline-verify-") as scratch:
        folder = Path(scratch)
        reader.unpack(mar, folder)
        names = [str(picture["file"]) for picture in contents.pictures]
        with Sandbox(folder, server=server) as sandbox:
            answers = sandbox.predict([(folder / GOLDEN / name).read_bytes() for name in names])
    for picture, answer in zip(contents.pictures, answers, strict=True):
        _compare(mar, contents, picture, answer)
    seconds = time.perf_counter() - start
    return Verified(mar, digest, contents.spec, server, len(names), sandbox.choice, sandbox.load_time, seconds)


def _compare(mar: Path, contents: reader.Contents, picture: dict[str, Any], answer: Answer) -> None:
    """Compare the handler's answer with the expected one; a user's handler may answer in a form of its own."""
    name = f"{GOLDEN}/{picture['file']}"
    if answer.status != 200:
        raise ArchiveError(
            f"{mar}: {name} is answered {answer.status} ({answer.body[:200]}), expected 200; build it again"
        )
    if contents.handler != reader.HANDLER:
        return
    got = answer.json()
    expected: Sequence[tuple[str, float]] = picture["top"]
    best, probability = expected[0]
    if next(iter(got), None) != best:
        found = next(iter(got.items()), ("nothing", 0.0))
        raise ArchiveError(
            f"{mar}: {name} is answered {found[0]!r} ({found[1]:.3f}), expected {best!r} ({probability:.3f}); "
            "build it again"
        )
    for label, probability in expected:
        if label in got and abs(got[label] - probability) > contents.spec.tolerance:
            raise ArchiveError(
                f"{mar}: {name} gives {label!r} {got[label]:.3f}, expected {probability:.3f} within "
                f"{contents.spec.tolerance}; build it again"
            )
