"""What a picture takes from bytes to the model's input: decoders in turns, on the same photographs.

Each runs in a process of its own, one thread; what is not installed is left out. Pillow-SIMD has Pillow's name, so it
is read from a folder: `pip install --no-deps --target FOLDER pillow-simd`.
"""

from __future__ import annotations

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
import typer
from numpy.typing import NDArray

from beeline import formats, pixels
from beeline.errors import BeelineError
from beeline.spec import Geometry
from bench.pictures import read
from bench.studies import Out, Rounds, job, keep
from host import ROOT

Decode = Callable[[bytes], NDArray[np.uint8]]
# Of the shorter side, and of the crop.
_SIZES = (256, 224)
DECODINGS = ("full", "scaled", "cuda")


def main(
    pictures: Annotated[Path, typer.Option(help="A photograph or a folder of them.")],
    out: Out,
    also: Annotated[list[Path] | None, typer.Option(help="A folder of packages that come first; repeat it.")] = None,
    rounds: Rounds = 7,
    most: Annotated[int, typer.Option(help="Pictures at most.")] = 40,
) -> None:
    """Print and keep milliseconds a picture, and how far its pixels are from those of a full decoding, of 255."""
    about = {"pictures": read(pictures, most).to_dict(), "most": most}
    with job(out, about) as journal:
        turns: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for number in range(rounds):
            for folder in (None, *(also or ())):
                for name in DECODINGS:
                    measure = partial(_start, name, folder, pictures, most)
                    values = journal.once(f"{name} {folder} {number}", measure)
                    if "missing" not in values:
                        turns.setdefault((name, values["version"]), []).append(values)
        rows = []
        for (name, version), own in turns.items():
            milliseconds, difference = round(median(turn["milliseconds"] for turn in own), 2), own[0]["difference"]
            rows.append({"decoder": name, "version": version, "milliseconds": milliseconds, "difference": difference})
            typer.echo(f"{name:8} {version:34} {milliseconds:6.2f} ms   {difference:5.2f} of 255")
        keep(out, about, {"rows": rows})


def _start(name: str, folder: Path | None, pictures: Path, most: int) -> dict[str, Any]:
    """Run `turn` in a process of its own, which finds the packages in `folder` first."""
    paths = [*([str(folder.resolve())] if folder else []), str(ROOT / "handlers"), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    code = "import json, sys; from pathlib import Path; from bench.studies.decoders import turn; "
    code += "print(json.dumps(turn(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))))"
    command = [sys.executable, "-c", code, name, str(pictures), str(most)]
    values: dict[str, Any] = json.loads(subprocess.check_output(command, env=environment))
    return values


def decoder(decoding: str) -> tuple[Decode, str] | None:
    """Return what decodes a JPEG, and its version; None where there is no CUDA device to decode on."""
    geometry = Geometry(*_SIZES, decoding=decoding)
    if decoding != "cuda":
        return lambda data: pixels.decode(data, geometry), f"Pillow {formats.pillow_version()}"
    import torch

    from beeline.cuda_jpeg import CudaJpegs

    if not torch.cuda.is_available():
        return None
    jpegs = CudaJpegs(torch.device("cuda"), geometry)

    def decode(data: bytes) -> NDArray[np.uint8]:
        (crop,) = jpegs.decode([data])
        if crop is None:
            raise BeelineError("a picture is not nvJPEG's to decode; name others with --pictures")
        return crop

    return decode, jpegs.version


def turn(name: str, pictures: Path, most: int) -> dict[str, Any]:
    """Decode every picture twice and time the second pass; called in a process of its own.

    Returns:
        Milliseconds a picture, the version, and the mean of |a - b| to the same Pillow's pixels, in full; or `missing`
        with the decoding that this machine cannot do.
    """
    made = decoder(name)
    if made is None:
        return {"missing": name}
    decode, version = made
    bodies = [body for body in read(pictures, most).bodies if body.startswith(b"\xff\xd8\xff")]
    crops = [decode(body) for body in bodies]
    start = time.perf_counter()
    for body in bodies:
        decode(body)
    milliseconds = 1000 * (time.perf_counter() - start) / len(bodies)
    full = [pixels.decode(body, Geometry(*_SIZES)) for body in bodies]
    difference = float(np.abs(np.subtract(crops, full, dtype=float)).mean())
    return {"milliseconds": milliseconds, "version": version, "difference": round(difference, 2)}


if __name__ == "__main__":
    typer.run(main)
