"""A generated picture set of two classes, for a machine without pictures and without a network."""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

from host.files import whole_folder

LABELS = ("circles", "stripes")


def generate(cache: Path, seed: int = 0, train: int = 80, val: int = 30) -> Path:
    """Draw `train` + `val` pictures a class under `cache` and return their folder; an existing one is reused.

    The pixels depend only on `seed`, since the files are PNG.
    """
    # The version, 1, is in the name, so that files of another version are not reused.
    folder = cache / f"generated-1-{seed}-{train}-{val}"
    if folder.is_dir():
        return folder
    with whole_folder(folder) as fresh:
        for split, count in (("train", train), ("val", val)):
            for label in LABELS:
                (fresh / split / label).mkdir(parents=True)
                for index in range(count):
                    picture = draw(label, random.Random(f"{seed}/{split}/{label}/{index}"))
                    picture.save(fresh / split / label / f"{index:03}.png")
    return folder


def draw(label: str, rng: random.Random) -> Image.Image:
    """Draw one picture of 200 to 320 pixels a side: discs or bars on a mottled ground.

    Colour, place, size and number are drawn alike for both classes, so only the shape differs.
    """
    width, height = rng.randint(200, 320), rng.randint(200, 320)
    ground, ink = _colour(rng), _colour(rng)
    while sum(abs(a - b) for a, b in zip(ground, ink, strict=True)) < 180:
        ink = _colour(rng)
    picture = Image.new("RGB", (width, height), ground)
    pen = ImageDraw.Draw(picture)
    for _ in range(30):
        x, y, size = rng.randrange(width), rng.randrange(height), rng.randint(5, 40)
        shade = tuple(max(0, min(255, part + rng.randint(-25, 25))) for part in ground)
        pen.rectangle((x, y, x + size, y + size), fill=shade)
    if label == "circles":
        for _ in range(rng.randint(3, 8)):
            x, y, radius = rng.randrange(width), rng.randrange(height), rng.randint(15, 45)
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
    else:
        slant, gap, thick = rng.randint(-width, width), rng.randint(24, 60), rng.randint(8, 20)
        for x in range(-2 * width, 3 * width, gap):
            pen.line((x, 0, x + slant, height), fill=ink, width=thick)
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.0, 1.5)))


def _colour(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)
