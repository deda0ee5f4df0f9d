"""The accepted formats: by their first bytes, if the Pillow of this process reads them."""

from __future__ import annotations

import io
import struct

import pytest
from PIL import Image, UnidentifiedImageError

from beeline import formats, pixels
from beeline.errors import NotAnImage
from beeline.spec import Geometry
from tests.conftest import picture
from tests.handlers.drawn import encoded


@pytest.mark.parametrize("kind", formats.FORMATS)
def test_each_format_has_its_first_bytes(kind: str) -> None:
    data = picture((0, 0, 0), (8, 8), kind)
    assert formats.kind_of(data[:16]) == kind
    assert formats.opened(kind, data).size == (8, 8)


@pytest.mark.parametrize("data", [b"", b"\xff", b"RIFF\0\0\0\0WAVE", b"\0\0\0\x20ftypheic", b"<svg/>"])
def test_other_bytes_have_no_format(data: bytes) -> None:
    assert formats.kind_of(data) is None


def test_a_format_that_pillow_was_built_without_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake of Pillow-SIMD without its plugin."""
    assert formats.LACKING == ()
    monkeypatch.setattr(formats, "LACKING", ("WEBP",))
    with pytest.raises(NotAnImage, match=r"WEBP pictures .* without WEBP\); send it as JPEG or PNG"):
        pixels.decode(picture((0, 0, 0), (8, 8), "WEBP"), Geometry(64, 64))
    assert formats.pillow_version().endswith(", without WEBP")


def test_an_exif_block_that_pillow_refuses_still_has_the_orientation() -> None:
    """Pillow refuses an empty text as the resolution."""
    entries = [(0x0112, 3, 1, 6), (0x011A, 2, 1, 0), (0x0128, 3, 1, 2)]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    block = b"Exif\0\0II*\0\x08\0\0\0" + directory + b"\0" * 4
    image = Image.new("RGB", (64, 64), "blue")
    image.paste("red", (0, 0, 32, 64))
    plain = encoded(image, "JPEG", quality=95)
    data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + plain[2:]
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(data))
    # After a quarter turn the left half is above.
    crop = pixels.decode(data, Geometry(64, 64))
    assert crop[4, 60].tolist() == pytest.approx([254, 0, 0], abs=4)
    assert crop[60, 4].tolist() == pytest.approx([0, 0, 254], abs=4)
