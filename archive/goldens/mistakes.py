"""Deliberate mistakes: one that the golden pictures do not notice could be served without anybody seeing it."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from beeline import pixels
from beeline.errors import ArchiveError, SelfTestError, did_you_mean
from beeline.golden import Forward, replay
from beeline.spec import Geometry, ModelSpec

MISTAKES = {
    "labels": "labels shifted by one",
    "channels": "red and blue swapped",
    "normalisation": "mean and deviation left out",
    "exif": "the EXIF orientation ignored",
    "geometry": "the picture squashed instead of cropped, or the other way round",
}
# The golden pictures must notice these. `geometry` is only recorded, since a square picture cannot show it.
REQUIRED = ("labels", "channels", "normalisation", "exif")
# What a conversion of the model can get wrong. The others concern the geometry code, which is the same for all engines.
OF_THE_MODEL = ("labels", "channels", "normalisation")
ORIENTATION = 0x0112

# On crops `[N, crop, crop, 3]` of 0..255.
Mistake = Callable[[Tensor], Tensor]
# Mean and standard deviation, per RGB channel.
Photometry = tuple[Sequence[float], Sequence[float]]


def check_names(names: Sequence[str]) -> None:
    """Raise `ArchiveError` for the first mistake that is not known."""
    for name in names:
        if name not in MISTAKES:
            raise ArchiveError(f"--blind-to is {name!r}{did_you_mean(name, MISTAKES)}")


def noticed(
    folder: Path, spec: ModelSpec, forward: Forward, pictures: Sequence[bytes], photometry: Photometry
) -> dict[str, bool]:
    """Make each mistake that is possible, and return whether the replay of the golden pictures fails for it.

    `pictures` are the bytes of the golden pictures of the export in `folder`, which replay without a mistake.
    """
    crops = np.stack([pixels.decode(data, spec.geometry) for data in pictures])
    shifted = dataclasses.replace(spec, labels=spec.labels[1:] + spec.labels[:1])
    results = {"labels": _fails(folder, shifted, forward, crops)}
    for name, mistaken in _mistaken(pictures, crops, spec.geometry, photometry).items():
        changed = not np.array_equal(mistaken, crops)
        # A model without normalisation cannot lose it. Grey pictures are the same with swapped channels: not noticed.
        if changed or name in ("channels", "exif"):
            results[name] = changed and _fails(folder, spec, forward, mistaken)
    return results


def on_crops(photometry: Photometry) -> dict[str, Mistake]:
    """Return the mistakes that have gradients."""
    mean, std = (torch.tensor(values, dtype=torch.float32) for values in photometry)
    return {
        "channels": lambda crops: crops.flip(-1),
        "normalisation": lambda crops: crops * std + 255 * mean,
        "exif": lambda crops: crops.rot90(1, (1, 2)),
    }


def _mistaken(
    pictures: Sequence[bytes], crops: NDArray[np.uint8], geometry: Geometry, photometry: Photometry
) -> dict[str, NDArray[np.uint8]]:
    """Return the crops that the model gets with each mistake.

    Without normalisation the network inside the graph gets `x / 255`. The graph always normalises, so here it gets the
    pixels whose normalised values are `x / 255`.
    """
    mean, std = (np.asarray(values) for values in photometry)
    unscaled = np.rint(crops * std + 255 * mean).clip(0, 255).astype(np.uint8)
    resize, fit = max(geometry.resize, *geometry.shape), "squash" if geometry.fit != "squash" else "crop"
    other = dataclasses.replace(geometry, resize=resize, fit=fit, decoding="full")
    return {
        "channels": np.ascontiguousarray(crops[..., ::-1]),
        "normalisation": unscaled,
        "exif": np.stack([pixels.decode(_without_exif(data), geometry) for data in pictures]),
        "geometry": np.stack([pixels.decode(data, other) for data in pictures]),
    }


def _fails(folder: Path, spec: ModelSpec, forward: Forward, crops: NDArray[np.uint8]) -> bool:
    # Twice the tolerance: what fails narrowly here could pass in another precision.
    strict = dataclasses.replace(spec, tolerance=min(0.5, 2 * spec.tolerance))
    try:
        replay(folder, strict, lambda _: forward(crops))
    except SelfTestError:
        return True
    return False


def _without_exif(data: bytes) -> bytes:
    """Return the stored pixels as a PNG without an orientation."""
    with Image.open(io.BytesIO(data)) as image:
        if image.getexif().get(ORIENTATION, 1) == 1:
            return data
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG", exif=Image.Exif())
    return buffer.getvalue()
