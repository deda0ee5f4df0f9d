"""Drawn pictures that the colour model can name: discs in shades of one colour."""

from __future__ import annotations

import colorsys
import io
import json
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
    for _ in range(rng.randint(4, 9)):
        x, y, radius = rng.randrange(width), rng.randrange(height), rng.randint(14, 60)
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_shade(label, rng, 0.8))
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
