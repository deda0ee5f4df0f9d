"""Scenes: drawn rows of shapes with their captions, for golden pictures and for a small model to learn."""

from __future__ import annotations

import random
from typing import Any

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40), "green": (44, 160, 44), "blue": (40, 80, 214), "yellow": (240, 210, 40),
    "purple": (140, 60, 180), "black": (20, 20, 20),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
GROUNDS = {"white": (245, 245, 245), "grey": (150, 150, 150)}
COUNTS = ("", "a", "two", "three", "four")
GRID = 4  # cells a side, in which shapes stand
_SIDES = {0: "left", GRID - 1: "right"}


def draw(rng: random.Random, size: tuple[int, int]) -> tuple[Image.Image, str]:
    """Draw up to three rows of shapes; return the picture, and its caption of 3 to 16 words."""
    width, height = size
    ground = rng.choice(list(GROUNDS))
    picture = Image.new("RGB", size, GROUNDS[ground])
    pen, parts = ImageDraw.Draw(picture), []
    rows = sorted(rng.sample(range(GRID), rng.choice((1, 2, 2, 3))))
    for row in rows:
        count, colour, shape = rng.randint(1, GRID), rng.choice(list(COLOURS)), rng.choice(SHAPES)
        columns = rng.sample(range(GRID), count)
        for column in columns:
            x, y = ((place + rng.uniform(0.45, 0.55)) / GRID for place in (column, row))
            wide, high = (side * rng.uniform(0.09, 0.11) for side in size)
            _shape(pen, shape, (x * width, y * height), (wide, high), COLOURS[colour])
        parts.append(f"{COUNTS[count]} {colour} {shape}{'s' * (count > 1)}")
    if len(rows) == count == 1 and columns[0] in _SIDES:
        parts[0] += f" on the {_SIDES[columns[0]]}"
    return picture, " above ".join(parts) + (f" on {ground}" if ground == "grey" else "")


def _shape(pen: ImageDraw.ImageDraw, shape: str, middle: Any, half: Any, ink: tuple[int, int, int]) -> None:
    (x, y), (wide, high) = middle, half
    box = (x - wide, y - high, x + wide, y + high)
    if shape == "triangle":
        pen.polygon([(x, y - high), (x + wide, y + high), (x - wide, y + high)], fill=ink)
    else:
        (pen.ellipse if shape == "circle" else pen.rectangle)(box, fill=ink)
