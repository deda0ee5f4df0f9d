"""The golden pictures of an export: made or given, with their answers, proved to notice mistakes."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from archive.graph import Differentiable
from archive.patterns import Pattern, ascend
from beeline import pixels
from beeline.answer import probabilities, top_labels
from beeline.errors import ArchiveError, RequestError, SelfTestError, did_you_mean
from beeline.golden import EXPECTED, FOLDER, Forward, replay
from beeline.spec import Geometry, ModelSpec

# Top-1 of every golden picture is at least this sure; what is less sure could tip over by rounding.
FLOOR = 0.65
MAX_PICTURES = 16
_TOP = 5
_ATTEMPTS = 3
_QUALITY = 95
_ORIENTATION = 0x0112
# EXIF: "turn me a quarter clockwise to see me upright".
_TURNED = 6

# Shorter side as a part of the spec's `resize`, longer side as a part of that, lying or standing, and
# how it is stored. None is square and none has the size that resize makes, so both steps matter.
_SHAPES = (
    (1.5, 1.2, True, "jpg"),
    (0.5, 1.25, False, "png"),
    (0.7, 1.4, True, "turned.jpg"),
    (0.75, 1.3, False, "jpg"),
)

MUTATIONS = {
    "labels": "labels shifted by one",
    "channels": "red and blue swapped",
    "normalisation": "mean and deviation left out",
    "exif": "the EXIF orientation ignored",
    "geometry": "the picture squashed instead of resized and cropped",
}
REQUIRED = ("labels", "channels", "normalisation", "exif")

Photometry = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Encoded:
    """One picture as it lies in the folder: its file ending and its bytes."""

    ending: str
    data: bytes


def check_mutations(names: Sequence[str]) -> None:
    """Refuse a mutation that is not known.

    Raises:
        ArchiveError: naming it.
    """
    for name in names:
        if name not in MUTATIONS:
            raise ArchiveError(f"goldens may be blind to {name!r}{did_you_mean(name, MUTATIONS)}")


def make(
    folder: Path,
    spec: ModelSpec,
    forward: Forward,
    differentiable: Differentiable,
    photometry: Photometry,
    pictures: Path | None = None,
    blind_to: Sequence[str] = (),
) -> None:
    """Write `folder/golden` with pictures and `expected.json`, and prove that they notice `REQUIRED` mistakes.

    Args:
        folder: of the export.
        spec: of the saved model.
        forward: the saved model in fp32.
        differentiable: the same on floats of 0..255, with gradients.
        photometry: mean and standard deviation that the model's normalisation uses.
        pictures: the user's own, to take instead of made ones.
        blind_to: mutations that need not be noticed, as by a model that sees no colour.

    Raises:
        ArchiveError: when pictures are missing, unclear to the model, or blind to a mistake.
    """
    encoded = _given(pictures, spec) if pictures else _made(spec, forward, differentiable)
    _write(folder, spec, forward, encoded, [])
    noticed = _noticed(folder, spec, forward, encoded, photometry)
    for attempt in range(1, _ATTEMPTS):
        missed = [name for name in REQUIRED if noticed.get(name) is False and name not in blind_to]
        if not missed or pictures:
            break
        encoded += _sharper(missed, attempt, spec, forward, differentiable, photometry)
        _write(folder, spec, forward, encoded, [])
        noticed = _noticed(folder, spec, forward, encoded, photometry)
    for name in REQUIRED:
        if noticed.get(name) is False and name not in blind_to:
            raise ArchiveError(
                f"the golden pictures would not notice {MUTATIONS[name]}; give pictures of your own that depend on it "
                f"with --golden DIR, or say --blind-to {name} if this model cannot tell"
            )
    _write(folder, spec, forward, encoded, [name for name, seen in noticed.items() if seen])


def _made(spec: ModelSpec, forward: Forward, differentiable: Differentiable) -> list[Encoded]:
    """Make pictures of up to four classes, the first and the last among them; drop what stays unclear."""
    classes = len(spec.labels)
    targets = (0, classes - 1, classes // 3, 2 * classes // 3)
    clear: dict[int, Encoded] = {}
    for attempt in range(_ATTEMPTS):
        numbers = [number for number in range(len(targets)) if number not in clear]
        patterns = [
            Pattern(targets[number], *_size(spec.geometry, number), seed=10 * attempt + number) for number in numbers
        ]
        painted = _ascend(differentiable, spec, patterns) if patterns else []
        for number, picture in zip(numbers, painted, strict=True):
            encoded = _encode(picture, _SHAPES[number][3])
            if _clear([encoded], spec, forward):
                clear[number] = encoded
    if len(clear) < 2:
        raise ArchiveError(
            f"no made picture gets a top-1 probability over {FLOOR} from this model; is it trained? "
            "if so, give pictures that it is sure of with --golden DIR"
        )
    return [clear[number] for number in sorted(clear)]


def _sharper(
    missed: Sequence[str],
    attempt: int,
    spec: ModelSpec,
    forward: Forward,
    differentiable: Differentiable,
    photometry: Photometry,
) -> list[Encoded]:
    """Make one more picture against each mutation that went unnoticed."""
    mean, std = (torch.tensor(values, dtype=torch.float32) for values in photometry)
    against: dict[str, Callable[[Tensor], Tensor]] = {
        "channels": lambda crops: crops.flip(-1),
        "normalisation": lambda crops: crops * std + 255 * mean,
        "exif": lambda crops: crops.rot90(1, (1, 2)),
    }
    names = [name for name in missed if name in against]
    patterns = [
        Pattern(
            (attempt - 1) % len(spec.labels), *_size(spec.geometry, 2), seed=100 * attempt + i, against=against[name]
        )
        for i, name in enumerate(names)
    ]
    painted = _ascend(differentiable, spec, patterns) if patterns else []
    return _clear([_encode(picture, "turned.jpg") for picture in painted], spec, forward)


def _ascend(differentiable: Differentiable, spec: ModelSpec, patterns: list[Pattern]) -> list[NDArray[np.uint8]]:
    try:
        return ascend(differentiable, spec.output, spec.geometry, patterns)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:160]
        raise ArchiveError(
            f"no golden pictures can be made, since no gradient passes this model ({why}); give pictures of your own "
            "with --golden DIR"
        ) from error


def _given(folder: Path, spec: ModelSpec) -> list[Encoded]:
    """Read the user's pictures, and turn the first one by EXIF for one more."""
    if not folder.is_dir():
        raise ArchiveError(f"the folder of golden pictures {folder} is missing; name a folder of pictures")
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if not 1 <= len(paths) <= MAX_PICTURES:
        raise ArchiveError(
            f"{folder} holds {len(paths)} files; allowed: 1 to {MAX_PICTURES} pictures, two or more classes"
        )
    encoded = []
    for path in paths:
        try:
            upright = pixels.open_rgb(path.read_bytes())
        except RequestError as error:
            raise ArchiveError(f"the golden picture {path} cannot be used: {error}") from error
        ending = path.suffix.lstrip(".").lower() or "jpg"
        encoded.append(Encoded(ending, path.read_bytes()))
        if len(encoded) == 1:
            upright.thumbnail((4 * spec.geometry.resize,) * 2)
            turned = _encode(np.asarray(upright), "turned.jpg")
    return [*encoded, turned]


def _write(folder: Path, spec: ModelSpec, forward: Forward, encoded: Sequence[Encoded], detects: Sequence[str]) -> None:
    """Write pictures and expected answers, and replay them once.

    Raises:
        ArchiveError: when the model is not sure of a picture.
    """
    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    entries = []
    for number, (picture, row) in enumerate(zip(encoded, _rows(encoded, spec, forward), strict=True)):
        top = top_labels(row, spec, _TOP)
        if not top[0][1] >= FLOOR:
            raise ArchiveError(
                f"golden picture {number} ({picture.ending}) gets {top[0][0]!r} with only {top[0][1]:.2f}; "
                f"take pictures of which the model is at least {FLOOR} sure"
            )
        name = f"{number}.{picture.ending.removeprefix('turned.')}"
        (target / name).write_bytes(picture.data)
        digest = hashlib.sha256(picture.data).hexdigest()
        entries.append({"file": name, "sha256": digest, "top": [[label, value] for label, value in top]})
    expected = {"schema": 1, "detects": list(detects), "pictures": entries}
    (target / EXPECTED).write_text(json.dumps(expected, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    replay(folder, spec, forward)


def _noticed(
    folder: Path, spec: ModelSpec, forward: Forward, encoded: Sequence[Encoded], photometry: Photometry
) -> dict[str, bool]:
    """Make each mistake on purpose; say of each that changes anything whether the replay fails."""
    crops = np.stack([pixels.decode(picture.data, spec.geometry) for picture in encoded])
    shifted = dataclasses.replace(spec, labels=spec.labels[1:] + spec.labels[:1])
    noticed = {"labels": _fails(folder, shifted, forward, crops)}
    for name, mutated in _mutated(encoded, crops, spec.geometry, photometry).items():
        if not np.array_equal(mutated, crops):
            noticed[name] = _fails(folder, spec, forward, mutated)
    return noticed


def _mutated(
    encoded: Sequence[Encoded], crops: NDArray[np.uint8], geometry: Geometry, photometry: Photometry
) -> dict[str, NDArray[np.uint8]]:
    """Return the crops as each mistake would show them to the model.

    Without normalisation the network inside the graph would see `x / 255`. The graph normalises what it
    is given, so it is given the pixels whose normalised values are just that.
    """
    mean, std = (np.asarray(values) for values in photometry)
    unscaled = np.rint(crops * std + 255 * mean).clip(0, 255).astype(np.uint8)
    untagged = [pixels.decode(_without_exif(picture.data), geometry) for picture in encoded]
    squashed = [
        np.asarray(pixels.open_rgb(picture.data).resize((geometry.crop, geometry.crop), Image.Resampling.BILINEAR))
        for picture in encoded
    ]
    return {
        "channels": np.ascontiguousarray(crops[..., ::-1]),
        "normalisation": unscaled,
        "exif": np.stack(untagged),
        "geometry": np.stack(squashed),
    }


def _fails(folder: Path, spec: ModelSpec, forward: Forward, crops: NDArray[np.uint8]) -> bool:
    # Twice the tolerance: what only just fails here could pass in another precision.
    strict = dataclasses.replace(spec, tolerance=min(0.5, 2 * spec.tolerance))
    try:
        replay(folder, strict, lambda _: forward(crops))
    except SelfTestError:
        return True
    return False


def _rows(encoded: Sequence[Encoded], spec: ModelSpec, forward: Forward) -> NDArray[np.float64]:
    crops = np.stack([pixels.decode(picture.data, spec.geometry) for picture in encoded])
    return probabilities(forward(crops), spec.output)


def _clear(encoded: list[Encoded], spec: ModelSpec, forward: Forward) -> list[Encoded]:
    if not encoded:
        return []
    rows = _rows(encoded, spec, forward)
    return [picture for picture, row in zip(encoded, rows, strict=True) if row.max() >= FLOOR]


def _size(geometry: Geometry, number: int) -> tuple[int, int]:
    """Return width and height of the picture of that number."""
    part, longer, lying, _ = _SHAPES[number]
    short = max(8, round(geometry.resize * part))
    long = round(short * longer)
    return (long, short) if lying else (short, long)


def _encode(picture: NDArray[np.uint8], ending: str) -> Encoded:
    image = Image.fromarray(picture)
    buffer = io.BytesIO()
    if ending == "png":
        image.save(buffer, "PNG", optimize=False, compress_level=9)
        return Encoded(ending, buffer.getvalue())
    exif = Image.Exif()
    if ending == "turned.jpg":
        image = image.transpose(Image.Transpose.ROTATE_90)
        exif[_ORIENTATION] = _TURNED
    # Whole colour resolution: the goldens are small and their colours are what the model looks at.
    image.save(buffer, "JPEG", quality=_QUALITY, subsampling=0, exif=exif)
    return Encoded(ending, buffer.getvalue())


def _without_exif(data: bytes) -> bytes:
    """Return the stored pixels as a PNG without any orientation."""
    with Image.open(io.BytesIO(data)) as image:
        if image.getexif().get(_ORIENTATION, 1) == 1:
            return data
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG", exif=Image.Exif())
    return buffer.getvalue()
