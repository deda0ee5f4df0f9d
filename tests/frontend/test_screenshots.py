"""Screenshots of the page for a person to look at: on a desk, on a phone, in the dark, and with fifty pictures.

`BEELINE_SCREENSHOTS` names the folder for them, as in `make screenshots`.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import FilePayload

from tests.conftest import LABELS
from tests.frontend.conftest import Open, Visit, payload
from tests.frontend.drawn import draw
from tests.frontend.test_access import DESK, PHONE, scrolls_sideways

pytestmark = pytest.mark.browser


def pictures(count: int) -> list[FilePayload]:
    """Return so many drawn pictures; among many, one is broken."""
    labels = [LABELS[number * 7 % 11 % 3] for number in range(count)]
    files = [payload(f"{label}-{number:02}.png", draw(label, number)) for number, label in enumerate(labels)]
    files[20:21] = [payload("notes.txt", b"hello, this is no picture")] if count > 20 else []
    return files


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """The folder for screenshots."""
    folder = Path(os.environ.get("BEELINE_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def shoot(seen: Visit, path: Path, whole: bool = True) -> Image.Image:
    """Take a picture of the page, or of what is in the window."""
    seen.page.evaluate("scrollTo(0, 0)")
    seen.page.mouse.move(0, 0)
    image = Image.open(io.BytesIO(seen.page.screenshot(full_page=whole)))
    # Few colours make a small file; this method keeps those of small parts.
    few = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
    return image


@pytest.mark.parametrize(
    ("name", "count", "whole", "options"),
    [
        ("desktop", 1, True, {"viewport": DESK}),
        ("phone", 5, True, {"viewport": PHONE, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}),
        ("dark", 9, True, {"viewport": DESK, "color_scheme": "dark"}),
        ("grid", 50, False, {"viewport": {"width": 1280, "height": 1180}}),
    ],
    ids=["desktop", "phone", "dark", "grid"],
)
def test_screenshot(visit: Open, kept: Path, name: str, count: int, whole: bool, options: dict[str, Any]) -> None:
    seen = visit(allowed=["415"], reduced_motion="reduce", **options)
    seen.pick(*pictures(count))
    seen.wait_done(count)
    seen.expect_answer("red")
    # Previews are decoded when the browser finds the time.
    seen.page.evaluate("Promise.all([...document.images].filter((one) => one.src).map((one) => one.decode()))")
    image = shoot(seen, kept / f"{name}.png", whole)
    assert not scrolls_sideways(seen.page)
    assert image.width == options["viewport"]["width"] * options.get("device_scale_factor", 1)
    assert len(set(image.convert("RGB").resize((64, 64)).get_flattened_data())) > 50
