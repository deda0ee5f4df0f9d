"""The accepted formats: by their first bytes, if the Pillow of this process reads them."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable

import pytest
from PIL import Image, UnidentifiedImageError

from beeline import formats, pixels
from beeline.errors import NotAnImage, RequestError, TooManyPixels, TruncatedImage
from beeline.spec import Geometry
from tests.conftest import picture
from tests.handlers.drawn import encoded


@pytest.mark.parametrize("kind", formats.FORMATS)
def test_each_format_has_its_first_bytes(kind: str) -> None:
    data = picture((0, 0, 0), (8, 8), kind)
    assert formats.kind_of(data[:16]) == kind
    assert formats.opened(kind, data).size == (8, 8)


@pytest.mark.parametrize("data", [b"", b"\xff", b"RIFF\0\0\0\0WAVE", b"\0\0\0\x20ftypisom", b"<svg/>"])
def test_other_bytes_have_no_format(data: bytes) -> None:
    assert formats.kind_of(data) is None


def test_heic_and_avif_are_told_apart_by_all_brands() -> None:
    def kind(brands: bytes) -> str | None:
        return formats.kind_of(struct.pack(">I", len(brands) + 8) + b"ftyp" + brands + bytes(64))

    assert {kind(brands) for brands in (b"heic....mif1heic", b"mif1....mif1heic", b"msf1....hevcmsf1")} == {"HEIC"}
    assert {kind(brands) for brands in (b"mif1....mif1avif", b"avif....mif1miaf", b"avif....mif1heic")} == {"AVIF"}
    assert kind(b"mp42....isommp42") is None


def raw_file(*entries: tuple[int, int]) -> bytes:
    """Return a TIFF's head with these tags of one number."""
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(64)


OTHERS = {
    b"\xff\x0a\xfa\x1f": "JPEG XL, .*save it as JPEG or PNG",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG 2000,",
    b"8BPS\0\1": "a Photoshop document",
    b"II*\0\x10\0\0\0CR\2\0": "raw file .*develop it",
    raw_file((50706, 257), (254, 0)): "raw file",
    raw_file((254, 1), (330, 900)): "raw file",
    b"%PDF-1.7": "PDF,.* a page of it",
    b"<?xml version='1.0'?>\n<!-- a drawing -->\n<svg/>": "SVG, .*render it as PNG",
    b"\0\0\0\x18ftypmp42": "a video .*one of its frames",
    b"\x1f\x8b\x08\0": "Content-Encoding: gzip.*send the picture itself",
}


@pytest.mark.parametrize(("data", "words"), OTHERS.items(), ids=map(repr, OTHERS))
def test_another_format_is_named_with_what_to_do(data: bytes, words: str) -> None:
    with pytest.raises(NotAnImage, match=words):
        pixels.decode(data, Geometry(64, 64))


def test_a_tiff_with_reduced_copies_below_it_is_no_raw_file() -> None:
    with pytest.raises(TruncatedImage):
        pixels.decode(raw_file((254, 0), (330, 900)), Geometry(64, 64))


def test_heic_is_named_where_nothing_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "READS_HEIC", False)
    with pytest.raises(NotAnImage, match=r"HEIC pictures .*pillow-heif is not installed\); send it as JPEG or PNG"):
        pixels.decode(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", Geometry(64, 64))


@pytest.fixture
def heic() -> Callable[..., bytes]:
    """Return a function that writes HEIC; the package that reads it is an extra."""
    pytest.importorskip("pillow_heif").register_heif_opener()
    return lambda image, **options: encoded(image, "HEIF", quality=-1, chroma=444, **options)


def test_heic_is_decoded_upright_and_over_white(heic: Callable[..., bytes]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (128, 64), "blue")
    image.paste("red", (0, 0, 64, 64))
    data = heic(image, exif=exif.tobytes())
    for kind in (data, data.replace(b"ftypheic", b"ftypmif1")):
        crop = pixels.decode(kind, Geometry(64, 64))
        assert crop[4, 32].tolist() == pytest.approx([255, 0, 0], abs=6)
        assert crop[60, 32].tolist() == pytest.approx([0, 0, 255], abs=6)
        assert pixels.open_rgb(kind).size == (64, 128)
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    assert pixels.decode(heic(clear), Geometry(64, 64)).min() >= 250
    with pytest.raises(TruncatedImage, match="HEI"):
        pixels.decode(data[:-40], Geometry(64, 64))


def test_heic_has_the_limit_of_pixels(heic: Callable[..., bytes]) -> None:
    data = heic(Image.new("L", (800, 600)))
    with pytest.raises(TooManyPixels, match=r"800 x 600 picture has 0\.5 megapixels"):
        pixels.decode(data, Geometry(64, 64), max_pixels=400_000)
    # A header that declares fewer pixels than are coded.
    size, less = (struct.pack(">II", *each) for each in ((800, 600), (80, 60)))
    assert size in data
    with pytest.raises(RequestError):
        pixels.decode(data.replace(size, less), Geometry(64, 64), max_pixels=400_000)


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
