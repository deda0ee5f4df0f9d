"""Milliseconds of a picture from bytes to the model's input, by decoder, in turns on the same photographs.

It measures the Pillow that it imports. For Pillow-SIMD, `pip install --no-deps --target FOLDER pillow-simd` and repeat
it with `PYTHONPATH=FOLDER`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer

from beeline import formats, pixels
from beeline.errors import BeelineError
from beeline.spec import Geometry
from bench.pictures import read
from bench.studies import Out, Rounds, keep

# Of the shorter side, and of the crop.
_SIZES = (256, 224)


def main(
    pictures: Annotated[Path, typer.Option(help="A photograph or a folder of them; JPEGs count.")],
    out: Out,
    rounds: Rounds = 7,
    most: Annotated[int, typer.Option(help="Pictures at most.")] = 40,
) -> None:
    """Print and keep milliseconds a picture, and the difference of its pixels from a full decoding, of 255."""
    sent, known = read(pictures, most), decoders()
    bodies = [body for body in sent.bodies if body.startswith(b"\xff\xd8\xff")]
    # The first pass of each decoder is not timed.
    crops = {name: list(map(decode, bodies)) for name, (decode, _) in known.items()}
    if any(crop is None for own in crops.values() for crop in own):
        raise BeelineError("nvJPEG does not decode one of the pictures; name others with --pictures")
    turns: dict[str, list[float]] = {name: [] for name in known}
    for _ in range(rounds):
        for name, (decode, _) in known.items():
            start = time.perf_counter()
            for body in bodies:
                decode(body)
            turns[name].append(1000 * (time.perf_counter() - start) / len(bodies))
    rows = []
    for name, (_, version) in known.items():
        milliseconds = round(median(turns[name]), 2)
        difference = round(float(np.abs(np.subtract(crops[name], crops["full"], dtype=float)).mean()), 2)
        rows.append({"decoder": name, "version": version, "milliseconds": milliseconds, "difference": difference})
        typer.echo(f"{name:8} {version:34} {milliseconds:6.2f} ms   {difference:5.2f} of 255")
    keep(out, {"pictures": sent.to_dict(), "most": most}, {"rows": rows})


def decoders() -> dict[str, tuple[Callable[[bytes], Any], str]]:
    """Return by name what this machine decodes with, and its version; the crops are uint8 `[crop, crop, 3]`."""
    pillow = f"Pillow {formats.pillow_version()}"
    known: dict[str, tuple[Callable[[bytes], Any], str]] = {}
    for name in ("full", "scaled"):
        known[name] = partial(pixels.decode, geometry=Geometry(*_SIZES, decoding=name)), pillow
    if torch.cuda.is_available():
        from beeline.cuda_jpeg import CudaJpegs

        jpegs = CudaJpegs(torch.device("cuda"), Geometry(*_SIZES, decoding="cuda"))
        known["cuda"] = (lambda data: jpegs.decode([data])[0]), jpegs.version
    return known


if __name__ == "__main__":
    typer.run(main)
