"""The golden pictures of an export: made or given, stored with the model's answers, proved to notice mistakes."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from archive.goldens import mistakes
from archive.goldens.patterns import Pattern, ascend
from archive.graph import Differentiable
from beeline import pixels
from beeline.answer import probabilities, top_labels
from beeline.errors import ArchiveError, RequestError
from beeline.golden import Forward, replay
from beeline.spec import EXPECTED, GOLDEN, Geometry, ModelSpec

# The least top-1 probability of a golden picture; rounding could change a less sure answer.
FLOOR = 0.65
MAX_PICTURES = 16
_TOP = 5
_ATTEMPTS = 3
_QUALITY = 95
# EXIF: a quarter turn clockwise makes the picture upright.
_TURNED = 6

# Shorter side as a part of the spec's `resize`, longer side as a part of the shorter, landscape or not, and how it is
# stored. None is square and none has the size that resize makes, so that both steps matter.
_SHAPES = (
    (1.5, 1.2, True, "jpg"),
    (0.5, 1.25, False, "png"),
    (0.7, 1.4, True, "turned.jpg"),
    (0.75, 1.3, False, "jpg"),
)


@dataclass(frozen=True)
class Encoded:
    """One picture as it lies in the folder: its file ending and its bytes."""

    ending: str
    data: bytes


def make(
    folder: Path,
    spec: ModelSpec,
    forward: Forward,
    differentiable: Differentiable,
    photometry: mistakes.Photometry,
    pictures: Path | None = None,
    blind_to: Sequence[str] = (),
) -> None:
    """Write `folder/golden` with pictures and `expected.json`, and prove that they notice each required mistake.

    Args:
        folder: of the export.
        spec: of the saved model.
        forward: the saved model in fp32.
        differentiable: the same on floats of 0..255, with gradients.
        photometry: mean and standard deviation that the model's normalisation uses.
        pictures: a folder of the user's own, instead of made ones.
        blind_to: mistakes that need not be noticed: a model may see no colour.

    Raises:
        ArchiveError: when pictures are missing, unclear to the model, or blind to a mistake.
    """
    encoded = _given(pictures, spec) if pictures else _made(spec, forward, differentiable)
    for attempt in range(1, _ATTEMPTS + 1):
        _write(folder, spec, forward, encoded, [])
        noticed = mistakes.noticed(folder, spec, forward, [picture.data for picture in encoded], photometry)
        missed = [name for name in mistakes.REQUIRED if noticed.get(name) is False and name not in blind_to]
        if not missed or pictures or attempt == _ATTEMPTS:
            break
        encoded += _sharper(missed, attempt, spec, forward, differentiable, photometry)
    if missed:
        raise ArchiveError(
            f"the golden pictures would not notice {mistakes.MISTAKES[missed[0]]}; give pictures of your own that "
            f"depend on it with --golden DIR, or say --blind-to {missed[0]} if this model cannot tell"
        )
    _write(folder, spec, forward, encoded, [name for name, seen in noticed.items() if seen])


def _made(spec: ModelSpec, forward: Forward, differentiable: Differentiable) -> list[Encoded]:
    """Make pictures of up to four classes, the first and the last included; drop those that the model is unsure of."""
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
            f"fewer than two made pictures get a top-1 probability over {FLOOR} from this model; is it trained? "
            "if so, give pictures that it is sure of with --golden DIR"
        )
    return [clear[number] for number in sorted(clear)]


def _sharper(
    missed: Sequence[str],
    attempt: int,
    spec: ModelSpec,
    forward: Forward,
    differentiable: Differentiable,
    photometry: mistakes.Photometry,
) -> list[Encoded]:
    """Make one more picture against each mistake that went unnoticed."""
    against = mistakes.on_crops(photometry)
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
    """Read the user's pictures, and add a copy of the first one that EXIF turns."""
    if not folder.is_dir():
        raise ArchiveError(f"the folder of golden pictures {folder} is missing; name a folder of pictures")
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if not 1 <= len(paths) <= MAX_PICTURES:
        raise ArchiveError(
            f"{folder} holds {len(paths)} files; allowed: 1 to {MAX_PICTURES} pictures of two classes or more"
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
    """Write the pictures with the model's answers, and replay them once.

    Raises:
        ArchiveError: when the model is not sure of a picture.
    """
    target = folder / GOLDEN
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
    part, longer, landscape, _ = _SHAPES[number]
    short = max(8, round(geometry.resize * part))
    long = round(short * longer)
    return (long, short) if landscape else (short, long)


def _encode(picture: NDArray[np.uint8], ending: str) -> Encoded:
    image = Image.fromarray(picture)
    buffer = io.BytesIO()
    if ending == "png":
        image.save(buffer, "PNG", optimize=False, compress_level=9)
        return Encoded(ending, buffer.getvalue())
    exif = Image.Exif()
    if ending == "turned.jpg":
        image = image.transpose(Image.Transpose.ROTATE_90)
        exif[mistakes.ORIENTATION] = _TURNED
    # Colours in full resolution: the goldens are small, and the model looks at their colours.
    image.save(buffer, "JPEG", quality=_QUALITY, subsampling=0, exif=exif)
    return Encoded(ending, buffer.getvalue())
