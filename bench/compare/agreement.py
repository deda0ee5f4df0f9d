"""How often a server's first label is the fp32 reference's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from beeline import pixels
from beeline.errors import RequestError, Undetermined
from beeline.spec import Geometry
from bench.compare import torchscript
from bench.pictures import Pictures

_BATCH = 16


def reference(folder: Path, pictures: Pictures) -> list[str]:
    """Return the fp32 model's first label of each picture, its pixels decoded in full.

    Args:
        folder: with `documented.pt` and `documented.json`.
        pictures: to classify.

    Raises:
        Undetermined: for a picture that cannot be decoded.
    """
    model, told = torchscript.load(folder)
    mean, std = (torch.tensor(told[key]).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    geometry = Geometry(told["resize"], told["crop"], told["interpolation"])
    found: list[str] = []
    for start in range(0, len(pictures.bodies), _BATCH):
        part = list(zip(pictures.names, pictures.bodies, strict=True))[start : start + _BATCH]
        rows = [_decode(name, body, geometry) for name, body in part]
        planes = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous().float() / 255
        with torch.inference_mode():
            best = model((planes - mean) / std).argmax(1)
        found += [told["labels"][int(index)] for index in best]
    return found


def share(got: Sequence[str | None], wanted: Sequence[str]) -> float | None:
    """Return how many of `wanted` were got; a picture without an answer counts against the server."""
    return sum(a == b for a, b in zip(got, wanted, strict=True)) / len(wanted) if wanted else None


def _decode(name: str, body: bytes, geometry: Geometry) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    try:
        return pixels.decode(body, geometry)
    except RequestError as error:
        raise Undetermined(f"{name} cannot be decoded ({error}); leave it out of --pictures") from error
