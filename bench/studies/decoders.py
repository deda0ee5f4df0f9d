"""What a picture takes from bytes to the model's input: decoders in turns, on the same photographs.

Each runs in a process of its own, one thread; what is not installed is left out. Pillow-SIMD has Pillow's name, so it
is read from a folder, as is simplejpeg: `pip install --no-deps --target FOLDER pillow-simd`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from beeline.errors import BeelineError
from beeline.spec import Geometry
from bench.pictures import read
from bench.studies import Out, Rounds, job

Decode = Callable[[bytes], NDArray[np.uint8]]
RESIZE, CROP = 256, 224
_ROOT = Path(__file__).resolve().parents[2]


def main(
    pictures: Annotated[Path, typer.Option(help="A photograph or a folder of them.")],
    also: Annotated[list[Path] | None, typer.Option(help="A folder of packages that come first; repeat it.")] = None,
    rounds: Rounds = 7,
    most: Annotated[int, typer.Option(help="Pictures at most.")] = 40,
    out: Out = None,
) -> None:
    """Print and keep milliseconds a picture, and the mean of |a - b| to Pillow's pixels, of 255."""
    with job("decoders", out, {"pictures": read(pictures, most).to_dict(), "most": most}) as journal:
        turns: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for number in range(rounds):
            for folder in (None, *(also or ())):
                for name in DECODERS:
                    measure = partial(_start, name, folder, pictures, most)
                    values = journal.once(f"{name} {folder} {number}", measure)
                    if "missing" not in values:
                        turns.setdefault((name, values["version"]), []).append(values)
        reference = np.array(next(iter(turns.values()))[0]["means"])
        rows = []
        for (name, version), own in turns.items():
            milliseconds = round(statistics.median(turn["milliseconds"] for turn in own), 2)
            difference = round(float(np.abs(np.array(own[0]["means"]) - reference).mean()), 2)
            rows.append({"decoder": name, "version": version, "milliseconds": milliseconds, "difference": difference})
            typer.echo(f"{name:24} {version:34} {milliseconds:6.2f} ms   {difference:5.2f} of 255")
        journal.add("result", {"rows": rows})


def _start(name: str, folder: Path | None, pictures: Path, most: int) -> dict[str, Any]:
    paths = [*([str(folder.resolve())] if folder else []), str(_ROOT / "handlers"), str(_ROOT)]
    command = [sys.executable, "-m", "bench.studies.decoders", "--turn", name, str(pictures), str(most)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BeelineError(f"the decoder {name} failed: {done.stderr.strip().splitlines()[-1]}")
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values


def _pillow(decoding: str) -> tuple[Decode, str]:
    from beeline import formats, pixels

    geometry = Geometry(RESIZE, CROP, decoding=decoding)
    return lambda data: pixels.decode(data, geometry), f"Pillow {formats.pillow_version()}"


def _simplejpeg() -> tuple[Decode, str]:
    import simplejpeg
    from PIL import Image

    from beeline import formats, pixels

    def decode(data: bytes) -> NDArray[np.uint8]:
        return pixels.resize_crop(Image.fromarray(simplejpeg.decode_jpeg(data)), Geometry(RESIZE, CROP))

    return decode, f"simplejpeg, {formats.pillow_version()}"


def _torchvision() -> tuple[Decode, str]:
    import torch
    import torchvision
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import v2

    torch.set_num_threads(1)
    resize = v2.Compose([v2.Resize(RESIZE, antialias=True), v2.CenterCrop(CROP)])

    def decode(data: bytes) -> NDArray[np.uint8]:
        planes = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        return np.ascontiguousarray(resize(planes).permute(1, 2, 0).numpy())

    return decode, f"torchvision {torchvision.__version__}"


def _nvjpeg() -> tuple[Decode, str]:
    import torch

    from beeline.cuda_jpeg import CudaJpegs

    if not torch.cuda.is_available():
        raise ModuleNotFoundError(name="a CUDA device")
    jpegs = CudaJpegs(torch.device("cuda"), Geometry(RESIZE, CROP, decoding="cuda"))

    def decode(data: bytes) -> NDArray[np.uint8]:
        (crop,) = jpegs.decode([data])
        if crop is None:
            raise BeelineError("a picture is not nvJPEG's to decode; name others with --pictures")
        return crop

    return decode, jpegs.version


DECODERS: dict[str, Callable[[], tuple[Decode, str]]] = {
    "pillow": lambda: _pillow("full"),
    "pillow, scaled": lambda: _pillow("scaled"),
    "libjpeg-turbo binding": _simplejpeg,
    "torchvision": _torchvision,
    "nvJPEG": _nvjpeg,
}


def turn(name: str, pictures: Path, most: int) -> dict[str, Any]:
    """Decode every picture twice and time the second pass; called in a process of its own.

    Returns:
        Milliseconds a picture, the version, and each picture's crop shrunk to 32 x 32 means for comparison; or
        `missing` with the package that is not there.
    """
    try:
        decode, version = DECODERS[name]()
    except ModuleNotFoundError as error:
        return {"missing": error.name}
    bodies = [body for body in read(pictures, most).bodies if body.startswith(b"\xff\xd8\xff")]
    crops = [decode(body) for body in bodies]
    start = time.perf_counter()
    for body in bodies:
        decode(body)
    milliseconds = 1000 * (time.perf_counter() - start) / len(bodies)
    means = [crop.reshape(32, 7, 32, 7, 3).mean((1, 3)).round(1).ravel().tolist() for crop in crops]
    return {"milliseconds": milliseconds, "version": version, "means": means}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--turn"]:
        sys.stdout.write(json.dumps(turn(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))))
    else:
        typer.run(main)
