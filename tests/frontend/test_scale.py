"""Pictures over the server's limits: scaled before they are sent, upright, or refused with a sentence."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Request, expect

from tests.conftest import picture
from tests.frontend.conftest import Open, Visit, payload

pytestmark = pytest.mark.browser
LIMIT = "to fit the server's limit of 20 MB / 50 megapixels"


def sent(seen: Visit) -> list[bytes]:
    """Record the bodies that are sent for predictions."""
    bodies: list[bytes] = []

    def keep(request: Request) -> None:
        if "/predictions/" in request.url and request.post_data_buffer is not None:
            bodies.append(request.post_data_buffer)

    seen.page.on("request", keep)
    return bodies


def test_too_many_pixels_are_scaled_and_a_turned_picture_is_sent_upright(visit: Open, tmp_path: Path) -> None:
    image = Image.new("RGB", (9000, 6000), (210, 20, 30))
    image.paste((20, 30, 200), (4500, 0, 9000, 6000))
    exif = Image.Exif()
    # 6: the camera was turned; the left side comes to the top.
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    seen = visit()
    bodies = sent(seen)
    seen.pick(tmp_path / "turned.jpg")
    seen.wait_done(1)
    note = seen.page.locator("#detail-note")
    expect(note).to_contain_text(LIMIT)
    found = re.search(r"scaled from 6000 x 9000 to (\d+) x (\d+)", note.inner_text())
    assert found
    expect(seen.card("turned.jpg").locator(".text")).to_contain_text("scaled from 6000 x 9000")
    expect(seen.page.locator("#code-note")).to_contain_text("over the server's limit")
    upright = Image.open(io.BytesIO(bodies[0]))
    width, height = upright.size
    assert (upright.format, width, height) == ("JPEG", int(found[1]), int(found[2]))
    assert width * height <= 50_000_000
    assert height / width == pytest.approx(1.5, abs=0.01)
    assert upright.getexif().get(0x0112, 1) == 1
    top, bottom = (np.asarray(upright)[height * i // 4, width // 2] for i in (1, 3))
    assert top[0] > 150 > top[2]
    assert bottom[2] > 150 > bottom[0]


def test_too_many_bytes(visit: Open, tmp_path: Path) -> None:
    file, other = tmp_path / "large.bmp", tmp_path / "large.bin"
    file.write_bytes(picture((20, 200, 30), (2800, 2500), "BMP"))
    assert file.stat().st_size > 20_000_000
    other.write_bytes(bytes(21_000_000))
    seen = visit()
    bodies = sent(seen)
    seen.pick(file)
    seen.expect_answer("green")
    expect(seen.page.locator("#detail-note")).to_contain_text(re.compile(f"saved again as JPEG, .* {re.escape(LIMIT)}"))
    seen.pick(other)
    seen.wait_done(2)
    verdict = seen.page.locator("#detail-verdict")
    expect(verdict).to_contain_text("21 MB, over the server's limit of 20 MB")
    expect(verdict).to_contain_text("this browser cannot read it as a picture")
    expect(seen.page.locator("#retry")).to_be_hidden()
    assert len(bodies) == 1


def test_a_picture_too_large_for_a_tab_is_sent_unchanged(visit: Open, tmp_path: Path) -> None:
    file = tmp_path / "bomb.png"
    Image.new("1", (16_000, 16_000)).save(file)
    seen = visit(allowed=["413"])
    bodies = sent(seen)
    seen.pick(file)
    seen.wait_done(1)
    expect(seen.page.locator("#detail-verdict")).to_contain_text("413: ")
    expect(seen.page.locator("#detail-note")).to_contain_text("256 megapixels are more than a browser should decode")
    assert bodies == [file.read_bytes()]
    expect(seen.page.locator("#detail-preview")).to_be_hidden()


def test_a_removed_picture_is_not_scaled(visit: Open) -> None:
    large = picture((20, 30, 200), (9000, 6000))
    seen = visit()
    page = seen.page
    seen.count_urls()
    # The decoding of the first picture waits, so that the picture can be removed meanwhile.
    page.evaluate(
        """() => {
          const decode = window.createImageBitmap;
          const released = new Promise((release) => Object.assign(window, { decoded: 0, release }));
          window.createImageBitmap = async (...all) => {
            window.decoded += 1;
            await released;
            return decode(...all);
          };
        }"""
    )
    seen.pick(payload("1.png", large), payload("2.png", large))
    expect(page.locator("#grid li .label", has_text="Preparing")).to_have_count(2)
    page.wait_for_function("() => window.decoded === 1")
    page.get_by_role("button", name="Clear all").click()
    assert page.evaluate("window.urls.size") == 0
    seen.pick(payload("3.png", large))
    page.evaluate("window.release()")
    seen.expect_answer("blue")
    assert page.evaluate("window.decoded") == 2
    # Of the third picture's file, and of its scaled copy.
    assert page.evaluate("window.urls.size") == 2


def test_a_picture_that_fits_is_sent_unchanged(visit: Open) -> None:
    seen = visit()
    bodies = sent(seen)
    data = picture((200, 10, 10), (300, 200), "JPEG", quality=95)
    seen.pick(payload("fits.jpg", data, "image/jpeg"))
    seen.expect_answer("red")
    assert bodies == [data]
