"""Milliseconds of a picture from bytes to the model's input, by decoder, in turns on the same photographs.

Each decoder runs in a process of its own, on one thread. Pillow-SIMD has Pillow's name, so it is read from a folder:
`pip install --no-deps --target FOLDER pillow-simd`.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
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
from bench.studies import Out, Rounds, job, keep
from host import ROOT

# Of the shorter side, and of the crop.
_SIZES = (256, 224)


def main(
    pictures: Annotated[Path, typer.Option(help="A photograph or a folder of them.")],
    out: Out,
    also: Annotated[list[Path] | None, typer.Option(help="A folder of packages that come first; repeat it.")] = None,
    rounds: Rounds = 7,
    most: Annotated[int, typer.Option(help="Pictures at most.")] = 40,
) -> None:
    """Print and keep milliseconds a picture, and the difference of its pixels from a full decoding, of 255."""
    about = {"pictures": read(pictures, most).to_dict(), "most": most}
    decodings = ["full", "scaled", *["cuda"] * torch.cuda.is_available()]
    with job(out, about) as journal:
        turns: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for number, folder, name in itertools.product(range(rounds), (None, *(also or ())), decodings):
            values = journal.once(f"{name} {folder} {number}", partial(_start, name, folder, pictures, most))
            turns.setdefault((name, values["version"]), []).append(values)
        rows = []
        for (name, version), own in turns.items():
            milliseconds, difference = round(median(turn["milliseconds"] for turn in own), 2), own[0]["difference"]
            rows.append({"decoder": name, "version": version, "milliseconds": milliseconds, "difference": difference})
            typer.echo(f"{name:8} {version:34} {milliseconds:6.2f} ms   {difference:5.2f} of 255")
        keep(out, about, {"rows": rows})


def _start(name: str, folder: Path | None, pictures: Path, most: int) -> dict[str, Any]:
    """Call `turn` in a process of its own, which finds the packages in `folder` first."""
    paths = [*([str(folder.resolve())] if folder else []), str(ROOT / "handlers"), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    code = "import json, sys; from pathlib import Path; from bench.studies.decoders import turn; "
    code += "print(json.dumps(turn(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))))"
    command = [sys.executable, "-c", code, name, str(pictures), str(most)]
    values: dict[str, Any] = json.loads(subprocess.check_output(command, env=environment))
    return values


def turn(decoding: str, pictures: Path, most: int) -> dict[str, Any]:
    """Decode every JPEG twice and time the second pass.

    Returns:
        `milliseconds` a picture, the decoder's `version`, and the mean `difference` from the pixels of a full decoding.
    """
    geometry, version = Geometry(*_SIZES, decoding=decoding), f"Pillow {formats.pillow_version()}"
    decode: Callable[[bytes], Any] = partial(pixels.decode, geometry=geometry)
    if decoding == "cuda":
        from beeline.cuda_jpeg import CudaJpegs

        jpegs = CudaJpegs(torch.device("cuda"), geometry)
        decode, version = (lambda data: jpegs.decode([data])[0]), jpegs.version
    bodies = [body for body in read(pictures, most).bodies if body.startswith(b"\xff\xd8\xff")]
    crops = [decode(body) for body in bodies]
    if any(crop is None for crop in crops):
        raise BeelineError("nvJPEG does not decode one of the pictures; name others with --pictures")
    start = time.perf_counter()
    for body in bodies:
        decode(body)
    milliseconds = 1000 * (time.perf_counter() - start) / len(bodies)
    full = [pixels.decode(body, Geometry(*_SIZES)) for body in bodies]
    difference = float(np.abs(np.subtract(crops, full, dtype=float)).mean())
    return {"milliseconds": milliseconds, "version": version, "difference": round(difference, 2)}


if __name__ == "__main__":
    typer.run(main)
