"""Drawn pictures that the colour model can name: discs, bars and combs in shades of one colour."""

from __future__ import annotations

import colorsys
import io
import json
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

from tests.conftest import LABELS

# Of red, green and blue, degrees around the wheel.
HUES = dict(zip(LABELS, (0, 120, 240), strict=True))
SAMPLES = 5


def draw(label: str, number: int, kind: str = "PNG") -> bytes:
    """Return the bytes of one picture; the same label and number give the same pixels."""
    rng = random.Random(f"{label}/{number}")
    width, height = rng.choice(((320, 240), (300, 240), (240, 240)))
    image = Image.new("RGB", (width, height), _shade(label, rng, 0.75))
    pen = ImageDraw.Draw(image)
    (_discs, _bars, _comb)[number % 3](pen, width, height, label, rng)
    target = io.BytesIO()
    image.filter(ImageFilter.GaussianBlur(0.7)).save(target, kind)
    return target.getvalue()


def put_samples(store: Path, model: str = "colours", version: str = "1.0") -> None:
    """Put samples where `archive build` puts those of a data set."""
    folder = store / "samples" / model / version
    folder.mkdir(parents=True)
    listed = []
    for number in range(SAMPLES):
        label = LABELS[number % len(LABELS)]
        file = f"{label}-{number + 1}.png"
        (folder / file).write_bytes(draw(label, number))
        listed.append({"file": file, "label": label, "source": "drawn"})
    (folder / "samples.json").write_text(json.dumps(listed))


def _shade(label: str, rng: random.Random, value: float) -> tuple[int, int, int]:
    hue = (HUES[label] + rng.uniform(-22, 22)) / 360 % 1
    shade = colorsys.hsv_to_rgb(hue, rng.uniform(0.15, 0.5), min(1, value + rng.uniform(-0.2, 0.2)))
    red, green, blue = (round(part * 255) for part in shade)
    return red, green, blue


def _discs(pen: ImageDraw.ImageDraw, width: int, height: int, label: str, rng: random.Random) -> None:
    for _ in range(rng.randint(4, 9)):
        x, y, radius = rng.randrange(width), rng.randrange(height), rng.randint(14, 60)
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_shade(label, rng, 0.8))


def _bars(pen: ImageDraw.ImageDraw, width: int, height: int, label: str, rng: random.Random) -> None:
    slant, gap = rng.randint(-width // 2, width // 2), rng.randint(28, 56)
    for x in range(-width, 2 * width, gap):
        pen.line((x, 0, x + slant, height), fill=_shade(label, rng, 0.85), width=gap // 2)


def _comb(pen: ImageDraw.ImageDraw, width: int, height: int, label: str, rng: random.Random) -> None:
    size = rng.randint(22, 36)
    across, down = size * math.sqrt(3), size * 1.5
    for line in range(int(height / down) + 2):
        for column in range(int(width / across) + 2):
            centre = (across * (column + line % 2 / 2), down * line)
            pen.regular_polygon((centre, size - 2), 6, rotation=30, fill=_shade(label, rng, 0.75))
