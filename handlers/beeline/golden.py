"""The golden pictures: a model proves at load that it answers as it did when it was exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beeline import pixels, tasks
from beeline.errors import SelfTestError
from beeline.files import SHORT, sha256
from beeline.spec import CHECKSUMS, EXPECTED, GOLDEN, ModelSpec

Forward = Callable[[NDArray[np.uint8]], Any]


def check_files(folder: Path, spec: ModelSpec) -> None:
    """Compare fingerprint, the geometry's version and every file's digest with the archive's own record.

    Raises:
        SelfTestError: naming the first thing that differs.
    """
    try:
        record = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        files: dict[str, str] = record["files"]
        fingerprint: str = record["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SelfTestError(f"{CHECKSUMS} is missing or unreadable ({error}); build the archive again") from error
    if fingerprint != spec.fingerprint():
        raise _differs("the spec's fingerprint", fingerprint, spec.fingerprint())
    if spec.geometry_version != pixels.GEOMETRY:
        raise SelfTestError(
            f"the geometry's version in beeline/pixels.py is {pixels.GEOMETRY}, the model was exported with "
            f"{spec.geometry_version}; export it and build the archive again"
        )
    for name, expected in sorted({**files, **spec.digests}.items()):
        try:
            actual = sha256(folder / name)
        except OSError as error:
            raise SelfTestError(f"{name} is missing; build the archive again") from error
        if actual != expected:
            raise _differs(name, expected, actual)


def replay(folder: Path, spec: ModelSpec, forward: Forward) -> int:
    """Answer the golden pictures and return their number; the spec's task compares.

    Raises:
        SelfTestError: naming the first picture that differs, and how.
    """
    try:
        expected = json.loads((folder / GOLDEN / EXPECTED).read_text(encoding="utf-8"))["pictures"]
        decoded = [pixels.decode((folder / GOLDEN / entry["file"]).read_bytes(), spec.geometry) for entry in expected]
    except Exception as error:
        raise _unreadable(error) from error
    if not expected:
        raise SelfTestError(f"{GOLDEN}/{EXPECTED} lists no picture; export the model again")
    results = forward(np.stack(decoded))
    try:
        tasks.of(spec).compare(expected, results)
    except (LookupError, TypeError, ValueError) as error:
        raise _unreadable(error) from error
    return len(expected)


def _unreadable(error: Exception) -> SelfTestError:
    return SelfTestError(f"{GOLDEN}/{EXPECTED} or a picture of it cannot be read ({error}); build again")


def _differs(what: str, expected: str, actual: str) -> SelfTestError:
    digests = f"{what} is {actual[:SHORT]}, the archive was built with {expected[:SHORT]}"
    return SelfTestError(f"{digests}; it was changed since: build it again")
