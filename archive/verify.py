"""Verify an archive: it is safe, complete, and answers its golden pictures in a clean worker process."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archive import mar as reader
from archive import store
from archive.sandbox import Sandbox
from beeline import tasks
from beeline.answer import Answer
from beeline.errors import ArchiveError
from beeline.spec import GOLDEN, ModelSpec
from host.files import sha256


@dataclass(frozen=True)
class Verified:
    """A verified archive. `pictures` is the number of golden pictures, `choice` see `Sandbox`."""

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
        seconds = {"load_seconds": round(self.load_seconds, 3), "seconds": round(self.seconds, 3)}
        about = {"server": self.server, "pictures": self.pictures, "choice": self.choice}
        return {**identity(self.mar, self.sha256, self.spec), **about, **seconds}


def identity(mar: Path, sha256: str, spec: ModelSpec) -> dict[str, Any]:
    """Return what tells an archive from others, as JSON values."""
    of_spec = {"name": spec.name, "version": spec.version, "fingerprint": spec.fingerprint()}
    return {"archive": str(mar), "sha256": sha256, **of_spec}


def verify(mar: Path, server: str = "torchserve") -> Verified:
    """Check an archive from its zip headers to its answers, and stop at the first thing that is wrong.

    First the archive must be safe to unpack, and equal to its checksums and to the store's index. Then a clean process
    loads it like a worker of `server`, which replays the golden pictures on the engine. Finally the handler must answer
    the golden pictures as requests. `ArchiveError` names what differs, and what was expected; `Undetermined` is raised
    when the handler gives no reply.
    """
    start = time.perf_counter()
    contents = reader.check(mar)
    digest = sha256(mar)
    if reason := store.changed(mar):
        raise ArchiveError(f"{mar} {reason}")
    with Sandbox(mar, server=server) as sandbox:
        with reader.opened(mar) as archive:
            bodies = [archive.read(f"{GOLDEN}/{picture['file']}") for picture in contents.pictures]
        answers = sandbox.predict(bodies)
    for picture, answer in zip(contents.pictures, answers, strict=True):
        if reason := _difference(contents, picture, answer):
            raise ArchiveError(f"{mar}: {GOLDEN}/{picture['file']} {reason}; build it again")
    seconds = time.perf_counter() - start
    return Verified(mar, digest, contents.spec, server, len(answers), sandbox.choice, sandbox.load_time, seconds)


def _difference(contents: reader.Contents, picture: dict[str, Any], answer: Answer) -> str | None:
    """Return how the handler's answer differs from the expected one.

    Of a user's handler the first label counts, where it answers with labels; it may answer in another form.
    """
    if answer.status != 200:
        return f"is answered {answer.status} ({answer.body[:200]}), expected 200"
    own, actual = contents.handler == reader.HANDLER, {}
    with suppress(ValueError, TypeError, LookupError, AttributeError):
        actual = dict(tasks.of(contents.spec).top(answer.json()))
    labels = set(contents.spec.labels) or set(actual)
    if not own and not (actual and set(actual) <= labels):
        return None
    expected: list[tuple[str, float]] = picture["top"]
    best, probability = expected[0]
    label, value = next(iter(actual.items()), ("nothing", 0.0))
    if label != best:
        return f"is answered {label!r} ({value:.3f}) by {contents.handler}, expected {best!r} ({probability:.3f})"
    tolerance = contents.spec.tolerance
    # With a temperature an answer is not the golden's; the worker has compared the golden itself at its load.
    for label, probability in expected if own and contents.spec.temperature is None else ():
        if label in actual and abs(actual[label] - probability) > tolerance:
            return f"gives {label!r} {actual[label]:.3f}, expected {probability:.3f} within {tolerance}"
    return None
