"""What a picture takes from bytes to the model's input: decoders beside each other, on the same photographs.

Each runs in a process of its own, one thread, in turns; what is not installed is left out and said. Pillow-SIMD has
Pillow's name, so it is read from a folder: `pip install --no-deps --target FOLDER pillow-simd`; a folder of simplejpeg
is taken in the same way. Run it as `python -m bench.decoders --pictures some/folder --also FOLDER`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from beeline.errors import BeelineError
from bench import machine
from bench.pictures import read
from bench.record import utc

Decode = Callable[[bytes], NDArray[np.uint8]]
RESIZE, CROP = 256, 224
_HANDLERS = Path(__file__).resolve().parents[1] / "handlers"


@dataclass(frozen=True)
class Row:
    """One decoder: milliseconds a picture (median over rounds of the mean), and how far its pixels are from Pillow's.

    `difference` is the mean of |a - b| over all pixels, of 255.
    """

    decoder: str
    version: str
    milliseconds: float
    difference: float


def main(
    pictures: Annotated[Path, typer.Option(help="A photograph or a folder of them.")],
    also: Annotated[list[Path] | None, typer.Option(help="A folder of packages that come first; repeat it.")] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each.")] = 7,
    most: Annotated[int, typer.Option(help="Pictures at most.")] = 40,
    out: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
) -> None:
    """Measure and print a table."""
    wanted = [(name, None) for name in DECODERS] + [(name, folder) for folder in also or () for name in DECODERS]
    turns: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(rounds):
        for name, folder in wanted:
            told = _turn(name, folder, pictures, most)
            if "missing" not in told:
                turns.setdefault((name, told["version"]), []).append(told)
    reference = np.array(next(iter(turns.values()))[0]["means"])
    rows = [
        Row(
            name,
            version,
            round(statistics.median(turn["milliseconds"] for turn in found), 2),
            round(float(np.abs(np.array(found[0]["means"]) - reference).mean()), 2),
        )
        for (name, version), found in turns.items()
    ]
    for row in rows:
        typer.echo(f"{row.decoder:24} {row.version:34} {row.milliseconds:6.2f} ms   {row.difference:5.2f} of 255")
    if out is not None:
        values = {
            "at": utc(),
            "machine": machine.describe(),
            "pictures": read(pictures, most).to_dict(),
            "rows": [asdict(row) for row in rows],
        }
        out.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _turn(name: str, folder: Path | None, pictures: Path, most: int) -> dict[str, Any]:
    paths = [*([str(folder.resolve())] if folder else []), str(_HANDLERS)]
    command = [sys.executable, "-m", "bench.decoders", "--turn", name, str(pictures), str(most)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BeelineError(f"the decoder {name} failed: {done.stderr.strip().splitlines()[-1]}")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def _pillow(decoding: str) -> tuple[Decode, str]:
    from beeline import formats, pixels
    from beeline.spec import Geometry

    geometry = Geometry(RESIZE, CROP, decoding=decoding)
    return lambda data: pixels.decode(data, geometry), f"Pillow {formats.pillow_version()}"


def _simplejpeg() -> tuple[Decode, str]:
    import simplejpeg
    from PIL import Image

    from beeline import formats, pixels
    from beeline.spec import Geometry

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
    from beeline.spec import Geometry

    if not torch.cuda.is_available():
        raise Missing("a CUDA device")
    jpegs = CudaJpegs(torch.device("cuda"), Geometry(RESIZE, CROP, decoding="cuda"))

    def decode(data: bytes) -> NDArray[np.uint8]:
        (crop,) = jpegs.decode([data])
        if crop is None:
            raise BeelineError("a picture is not nvJPEG's to decode; name others with --pictures")
        return crop

    return decode, jpegs.version


class Missing(Exception):
    """What a decoder needs and is not here."""


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
    except Missing as error:
        return {"missing": str(error)}
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
