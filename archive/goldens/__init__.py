"""The golden pictures of an export: made or given, stored with the model's answers, and proved to notice mistakes.

The project ships no photographs. Made pictures are smooth random colours, changed by gradient ascent until the model is
sure of their class. They need not look like anything: other preprocessing must give another answer.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from archive.goldens import mistakes
from archive.goldens.mistakes import Mistake
from archive.graph import Differentiable
from beeline import pixels
from beeline.classification import probabilities, top_labels
from beeline.errors import ArchiveError, RequestError, short
from beeline.golden import Forward, replay
from beeline.spec import EXPECTED, GOLDEN, Geometry, ModelSpec
from host import Say, silent
from host.files import write_json

# The least top-1 probability of a golden picture, and its least distance to the next label: rounding could change a
# less certain answer. Of probabilities the first implies the second; of scores, which need not sum to 1, it does not.
FLOOR, _AHEAD = 0.65, 0.29
MAX_PICTURES = 16
_TOP = 5
_ATTEMPTS = 3
_QUALITY = 95
# EXIF: a quarter turn clockwise makes the picture upright.
_TURNED = 6
# Shorter side as a part of the spec's `resize`, longer side as a multiple of the shorter, landscape or not, and how it
# is stored. None is square and none has the size that resize gives, so both steps matter.
SHAPES = ((1.5, 1.2, True, "jpg"), (0.5, 1.25, False, "png"), (0.7, 1.4, True, "turned.jpg"), (0.75, 1.3, False, "jpg"))
# Sure but not saturated: at 0.88 a small change of the input still moves the probability.
_AIM = 0.88
_GOOD_ENOUGH = (0.8, 0.95)
_STEPS = 60
_RATE = 0.3
# Cells of colour along the shorter side. With fewer, the ascent takes three times as many steps.
_CELLS = 40
# With slightly noisy pixels the ascent finds pictures whose answer does not depend on a decoder's rounding.
_NOISE = 3.0


@dataclass(frozen=True)
class Model:
    """The exported model: its spec, its forward pass in fp32, the same with gradients, and its normalisation."""

    spec: ModelSpec
    forward: Forward
    differentiable: Differentiable
    photometry: mistakes.Photometry

    def rows(self, pictures: Sequence[Encoded]) -> NDArray[np.float64]:
        """Return the probabilities of pictures, `[N, classes]`."""
        crops = np.stack([pixels.decode(picture.data, self.spec.geometry) for picture in pictures])
        return probabilities(self.forward(crops), self.spec.output)


@dataclass(frozen=True)
class Encoded:
    """One golden picture: its file ending, its bytes, and the name of the user's file."""

    ending: str
    data: bytes
    name: str = "a made one"


@dataclass(frozen=True)
class Pattern:
    """One picture to make: its class, its size in pixels, its seed and how it is stored.

    `against` is a mistake on crops `[N, crop, crop, 3]` that the picture must expose.
    """

    target: int
    width: int
    height: int
    seed: int
    ending: str
    against: Mistake | None = None


def make(folder: Path, model: Model, own: Path | None, blind_to: Sequence[str], say: Say = silent) -> None:
    """Write `folder/golden` with pictures and `expected.json`, and prove that they notice each required mistake.

    `folder` is the export of the `model`. `own` is a folder of the user's pictures; None makes some. The pictures need
    not notice the mistakes `blind_to`, since some models see no colour. `say` is told when a further search begins.
    Raise `ArchiveError` when pictures are missing, unclear to the model, or do not notice a mistake.
    """
    encoded = given(own, model.spec) if own else _made(model, say)
    for attempt in range(1, _ATTEMPTS + 1):
        _write(folder, model, encoded, [])
        data = [picture.data for picture in encoded]
        noticed = mistakes.noticed(folder, model.spec, model.forward, data, model.photometry)
        missed = [name for name in mistakes.REQUIRED if noticed.get(name) is False and name not in blind_to]
        if not missed or own or attempt == _ATTEMPTS:
            break
        say(f"  the golden pictures do not notice {_named(missed)} yet: making more")
        # One more picture for each missed mistake that has gradients.
        against = mistakes.on_crops(model.photometry)
        target = (attempt - 1) % len(model.spec.labels)
        chosen = [against[name] for name in missed if name in against]
        patterns = [pattern(model.spec.geometry, 2, target, 100 * attempt + i, each) for i, each in enumerate(chosen)]
        encoded += [picture for picture in _draw(model, patterns) if picture]
    check_noticed(missed)
    _write(folder, model, encoded, [name for name, seen in noticed.items() if seen])


def check_noticed(missed: Sequence[str]) -> None:
    """Raise `ArchiveError` where golden pictures miss mistakes."""
    if missed:
        options = " ".join(f"--blind-to {name}" for name in missed)
        fix = f"give your own that depend on it with --golden DIR, or say {options} if this model cannot tell"
        raise ArchiveError(f"the golden pictures would not notice {_named(missed)}; {fix}")


def _named(missed: Sequence[str]) -> str:
    return " and ".join(mistakes.MISTAKES[name] for name in missed)


def _made(model: Model, say: Say) -> list[Encoded]:
    """Make pictures of up to four classes, the first and the last included, of which the model is sure."""
    classes = len(model.spec.labels)
    targets = (0, classes - 1, classes // 3, 2 * classes // 3)
    clear: dict[int, Encoded] = {}
    for attempt in range(_ATTEMPTS):
        numbers = [number for number in range(len(targets)) if number not in clear]
        patterns = [pattern(model.spec.geometry, number, targets[number], 10 * attempt + number) for number in numbers]
        pictures = zip(numbers, _draw(model, patterns), strict=True)
        clear |= {number: picture for number, picture in pictures if picture}
        if not clear:
            # No other start will find one either.
            break
        if attempt + 1 < _ATTEMPTS and len(clear) < len(targets):
            say(f"  the model is sure of {len(clear)} of {len(targets)} golden pictures: searching for more")
    if len(clear) < 2:
        fix = "is it trained? if so, give pictures that it is sure of with --golden DIR"
        raise ArchiveError(f"fewer than two made pictures get a top-1 probability over {FLOOR} from this model; {fix}")
    return [clear[number] for number in sorted(clear)]


def pattern(geometry: Geometry, number: int, target: int, seed: int, against: Mistake | None = None) -> Pattern:
    """Return a picture to make, in shape `number` of `SHAPES`, for a model that takes pictures so."""
    part, longer, landscape, ending = SHAPES[number]
    short = max(8, round((geometry.resize if geometry.fit == "crop" else max(geometry.shape)) * part))
    long = round(short * longer)
    width, height = (long, short) if landscape else (short, long)
    return Pattern(target, width, height, seed, ending, against)


def _draw(model: Model, patterns: Sequence[Pattern]) -> list[Encoded | None]:
    """Make and encode pictures; None for each of which the model is not sure."""
    if not patterns:
        return []
    try:
        painted = _ascend(model, patterns)
    except RuntimeError as error:
        why = f"no golden pictures can be made, since no gradient passes this model ({short(error)})"
        raise ArchiveError(f"{why}; give pictures of your own with --golden DIR") from error
    encoded = [encode(picture, pattern.ending) for picture, pattern in zip(painted, patterns, strict=True)]
    return [picture if _is_sure(model.rows([picture])[0]) else None for picture in encoded]


def _is_sure(row: NDArray[np.float64]) -> bool:
    second, first = np.sort(row)[-2:]
    return bool(first >= FLOOR and first - second >= _AHEAD)


def _ascend(model: Model, patterns: Sequence[Pattern]) -> list[NDArray[np.uint8]]:
    """Return an upright picture for each pattern, uint8 `[height, width, 3]` RGB; the model may not be sure of it.

    Raise `RuntimeError` if no gradient reaches the pictures.
    """
    run, output, geometry = model.differentiable, model.spec.output, model.spec.geometry
    grids = [_start(pattern).requires_grad_() for pattern in patterns]
    optimiser = torch.optim.Adam(grids, lr=_RATE)
    active = list(range(len(patterns)))
    generator = torch.Generator().manual_seed(0)
    for _ in range(_STEPS):
        crops = torch.cat([_crop(_paint(grids[i], patterns[i]), geometry) for i in active])
        crops = crops + _NOISE * torch.randn(crops.shape, generator=generator)
        likely, unlikely = _logarithms(run(crops), output, [patterns[i].target for i in active])
        chances = likely.exp()
        # Cross-entropy to _AIM also pulls back a probability that is too high.
        loss = -(_AIM * likely + (1 - _AIM) * unlikely).sum()
        exposed = torch.ones(len(active), dtype=torch.bool)
        for place, i in enumerate(active):
            mistake = patterns[i].against
            if mistake is not None:
                fooled, wary = _logarithms(run(mistake(crops[place : place + 1])), output, [patterns[i].target])
                loss = loss - wary.sum()
                exposed[place] = bool(fooled.exp() < chances[place] - 0.3)
        done = (chances > _GOOD_ENOUGH[0]) & (chances < _GOOD_ENOUGH[1]) & exposed
        active = [i for place, i in enumerate(active) if not done[place]]
        if not active:
            break
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if not any(grid.grad is not None and bool(grid.grad.any()) for grid in grids):
            # Where scores are 0 or 1, or where the model has none.
            break
        optimiser.step()
    with torch.no_grad():
        painted = [_paint(grid, pattern)[0].round() for grid, pattern in zip(grids, patterns, strict=True)]
    return [np.ascontiguousarray(picture.to(torch.uint8).numpy()) for picture in painted]


def _start(pattern: Pattern) -> Tensor:
    short = min(pattern.width, pattern.height)
    rows, columns = (max(2, round(_CELLS * side / short)) for side in (pattern.height, pattern.width))
    generator = torch.Generator().manual_seed(pattern.seed)
    return torch.randn(1, 3, rows, columns, generator=generator) * 0.7


def _paint(grid: Tensor, pattern: Pattern) -> Tensor:
    """Grid to picture: `[1, height, width, 3]`, floats of 0..255."""
    smooth = functional.interpolate(grid, size=(pattern.height, pattern.width), mode="bicubic", align_corners=False)
    return torch.sigmoid(smooth).permute(0, 2, 3, 1) * 255


def _crop(picture: Tensor, geometry: Geometry) -> Tensor:
    """Resize and crop like `beeline.pixels`, but with gradients."""
    planes = picture.permute(0, 3, 1, 2)
    height, width = planes.shape[2:]
    # The same rounding: the model answers a picture that is shifted by a pixel differently.
    wide, high, left, top = pixels.placed(width, height, geometry)
    tall, broad = geometry.shape
    planes = functional.interpolate(planes, size=(high, wide), mode="bilinear", antialias=True)
    planes = planes[:, :, max(top, 0) : top + tall, max(left, 0) : left + broad]
    before, above = max(-left, 0), max(-top, 0)
    around = (before, broad - planes.shape[3] - before, above, tall - planes.shape[2] - above)
    return functional.pad(planes, around).permute(0, 2, 3, 1)


def _logarithms(rows: Tensor, output: str, targets: list[int]) -> tuple[Tensor, Tensor]:
    """Return the logarithms of each row's probability of its target, and of anything else.

    A logarithm keeps its gradient where a probability is rounded to 0 or 1.
    """
    chosen = functional.one_hot(torch.tensor(targets), rows.shape[1]).bool()
    if output == "scores":
        # The probability that the target holds and the strongest other label does not.
        alone = rows[chosen] * (1 - rows.masked_fill(chosen, 0).amax(1))
        return alone.clamp_min(1e-12).log(), (1 - alone).clamp_min(1e-12).log()
    logarithms = rows.clamp_min(1e-12).log() if output == "probabilities" else rows.log_softmax(1)
    return logarithms[chosen], logarithms.masked_fill(chosen, -torch.inf).logsumexp(1)


def read_given(folder: Path) -> tuple[list[Encoded], Image.Image]:
    """Return the user's pictures, and the first one upright; raise `ArchiveError` for anything else in the folder."""
    if not folder.is_dir():
        raise ArchiveError(f"the folder of golden pictures {folder} is missing; name a folder of pictures")
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if not 1 <= len(paths) <= MAX_PICTURES:
        allowed = f"1 to {MAX_PICTURES} pictures of two classes or more"
        raise ArchiveError(f"{folder} holds {len(paths)} files; allowed: {allowed}")
    encoded: list[Encoded] = []
    for path in paths:
        data = path.read_bytes()
        try:
            opened = pixels.open_rgb(data)
        except RequestError as error:
            raise ArchiveError(f"the golden picture {path} cannot be used: {error}") from error
        if not encoded:
            first = opened
        encoded.append(Encoded(path.suffix.lstrip(".").lower() or "jpg", data, path.name))
    return encoded, first


def given(folder: Path, spec: ModelSpec) -> list[Encoded]:
    """Return the user's pictures, and a copy of the first one that is turned by EXIF."""
    encoded, upright = read_given(folder)
    upright.thumbnail((4 * spec.geometry.resize,) * 2)
    return [*encoded, replace(encode(np.asarray(upright), "turned.jpg"), name=f"{encoded[0].name}, turned")]


def _write(folder: Path, model: Model, encoded: Sequence[Encoded], detects: Sequence[str]) -> None:
    """Write the pictures with the model's answers, of which it must be sure, and replay them once."""
    target = folder / GOLDEN
    target.mkdir(exist_ok=True)
    entries = []
    unsure: list[str] = []
    for number, (picture, row) in enumerate(zip(encoded, model.rows(encoded), strict=True)):
        top = top_labels(row, model.spec, _TOP)
        if not _is_sure(row):
            (first, most), (second, next_most) = top[:2]
            unsure.append(f"{picture.name} ({first!r} {most:.2f}, {second!r} {next_most:.2f})")
        name = f"{number}.{picture.ending.removeprefix('turned.')}"
        (target / name).write_bytes(picture.data)
        digest = hashlib.sha256(picture.data).hexdigest()
        entries.append({"file": name, "sha256": digest, "top": [[label, value] for label, value in top]})
    if unsure:
        fix = f"take pictures of one label, of which the model is at least {FLOOR} sure"
        raise ArchiveError(f"the model is not sure of the golden pictures {', '.join(unsure)}; {fix}")
    write_json(target / EXPECTED, {"schema": 1, "detects": list(detects), "pictures": entries})
    replay(folder, model.spec, model.forward)


def encode(picture: NDArray[np.uint8], ending: str) -> Encoded:
    """Store uint8 `[height, width, 3]` as `png`, `jpg`, or `turned.jpg`, which EXIF makes upright."""
    image = Image.fromarray(picture)
    buffer = io.BytesIO()
    if ending == "png":
        image.save(buffer, "PNG", optimize=False, compress_level=9)
        return Encoded(ending, buffer.getvalue())
    exif = Image.Exif()
    if ending == "turned.jpg":
        image = image.transpose(Image.Transpose.ROTATE_90)
        exif[mistakes.ORIENTATION] = _TURNED
    # Colours in full resolution: the pictures are small, and the model looks at their colours.
    image.save(buffer, "JPEG", quality=_QUALITY, subsampling=0, exif=exif)
    return Encoded(ending, buffer.getvalue())
