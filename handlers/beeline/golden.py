"""The golden pictures: a model proves at load that it answers as it did when it was exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from beeline import pixels
from beeline.answer import probabilities, top_labels
from beeline.errors import SelfTestError
from beeline.files import SHORT, sha256
from beeline.spec import CHECKSUMS, EXPECTED, GOLDEN, ModelSpec

Forward = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


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
    for name, expected in sorted({**files, **spec.model.digests}.items()):
        try:
            actual = sha256(folder / name)
        except OSError as error:
            raise SelfTestError(f"{name} is missing; build the archive again") from error
        if actual != expected:
            raise _differs(name, expected, actual)


def replay(folder: Path, spec: ModelSpec, forward: Forward) -> int:
    """Answer the golden pictures and return their number: the same top-1, each probability within `spec.tolerance`.

    Raises:
        SelfTestError: naming the first picture that differs, its label and both values.
    """
    try:
        pictures = json.loads((folder / GOLDEN / EXPECTED).read_text(encoding="utf-8"))["pictures"]
        names = [str(entry["file"]) for entry in pictures]
        expected = [[(str(label), float(value)) for label, value in entry["top"]] for entry in pictures]
        decoded = [pixels.decode((folder / GOLDEN / name).read_bytes(), spec.geometry) for name in names]
    except Exception as error:
        raise SelfTestError(f"{GOLDEN}/{EXPECTED} or a picture of it cannot be read ({error}); build again") from error
    if not names:
        raise SelfTestError(f"{GOLDEN}/{EXPECTED} lists no picture; export the model again")
    rows = probabilities(forward(np.stack(decoded)), spec.output)
    for name, row, top in zip(names, rows, expected, strict=True):
        got = dict(top_labels(row, spec, len(spec.labels)))
        best = next(iter(got))
        first, value = top[0]
        if not np.isfinite(row).all():
            raise SelfTestError(f"{GOLDEN}/{name} gives a number that is not finite; export the model again")
        if best != first:
            raise SelfTestError(
                f"{GOLDEN}/{name} is answered {best!r} ({got[best]:.3f}), expected {first!r} ({value:.3f}); model, "
                "labels or preprocessing are not those of the export: build the archive again"
            )
        for label, value in top:
            if abs(got.get(label, -1.0) - value) > spec.tolerance:
                raise SelfTestError(
                    f"{GOLDEN}/{name} gives {label!r} {got.get(label, float('nan')):.3f}, expected {value:.3f} "
                    f"within {spec.tolerance}; preprocessing or precision is not that of the export: build again"
                )
    return len(names)


def _differs(what: str, expected: str, actual: str) -> SelfTestError:
    digests = f"{what} is {actual[:SHORT]}, the archive was built with {expected[:SHORT]}"
    return SelfTestError(f"{digests}; it was changed since: build it again")
