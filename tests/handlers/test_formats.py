"""The formats that are taken: by their first bytes, as far as the Pillow of this process reads them."""

from __future__ import annotations

import io
import struct

import pytest
from PIL import Image, UnidentifiedImageError

from beeline import formats, pixels
from beeline.errors import NotAnImage
from beeline.spec import Geometry


@pytest.mark.parametrize("kind", formats.FORMATS)
def test_each_format_is_told_by_its_first_bytes(kind: str) -> None:
    target = io.BytesIO()
    Image.new("RGB", (8, 8)).save(target, kind)
    assert formats.kind_of(target.getvalue()[:16]) == kind
    assert formats.opened(kind, target.getvalue()).size == (8, 8)


@pytest.mark.parametrize("data", [b"", b"\xff", b"RIFF\0\0\0\0WAVE", b"\0\0\0\x20ftypheic", b"<svg/>"])
def test_others_are_none(data: bytes) -> None:
    assert formats.kind_of(data) is None


def test_a_format_that_pillow_was_built_without_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Pillow-SIMD without its plugin; a fake, the real one is in test_pillow_simd.py."""
    assert formats.LACKING == ()
    monkeypatch.setattr(formats, "LACKING", ("WEBP",))
    target = io.BytesIO()
    Image.new("RGB", (8, 8)).save(target, "WEBP")
    with pytest.raises(NotAnImage, match=r"WEBP pictures .* without WEBP\); send it as JPEG or PNG"):
        pixels.decode(target.getvalue(), Geometry(64, 64))
    assert formats.pillow_version().endswith(", without WEBP")


def test_a_block_that_pillow_gives_up_on_still_says_how_the_picture_is_turned() -> None:
    """An empty text as the resolution, which is what Pillow stumbles over."""
    entries = [(0x0112, 3, 1, 6), (0x011A, 2, 1, 0), (0x0128, 3, 1, 2)]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    block = b"Exif\0\0II*\0\x08\0\0\0" + directory + b"\0" * 4
    image = Image.new("RGB", (64, 64), "blue")
    image.paste("red", (0, 0, 32, 64))
    target = io.BytesIO()
    image.save(target, "JPEG", quality=95)
    plain = target.getvalue()
    data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + plain[2:]
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(data))
    # A quarter turn puts above what was left.
    crop = pixels.decode(data, Geometry(64, 64))
    assert crop[4, 60].tolist() == pytest.approx([254, 0, 0], abs=4)
    assert crop[60, 4].tolist() == pytest.approx([0, 0, 254], abs=4)
