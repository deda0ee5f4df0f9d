"""The geometry against torchvision's, and every odd colour mode against what it should look like."""

from __future__ import annotations

import io
import resource
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision import transforms

from beeline import pixels
from beeline.errors import EmptyBody, NotAnImage, RequestError, TooManyPixels, TruncatedImage
from beeline.spec import Geometry
from tests.handlers.drawn import encoded

GEOMETRY = Geometry(256, 224)
BILINEAR, BICUBIC = Image.Resampling.BILINEAR, transforms.InterpolationMode.BICUBIC
REFERENCE = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def padded(image: Image.Image, width: int, height: int) -> Image.Image:
    """Fit a picture as Pillow does, and add black as torchvision's `CenterCrop` does."""
    return transforms.CenterCrop((height, width))(ImageOps.contain(image, (width, height), BILINEAR))


def independent_decode(data: bytes) -> Image.Image:
    """Decode as Pillow's documentation says, without this project's code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            wide = np.asarray(image).astype(np.float64)
            grey = np.where(wide == image.info.get("transparency", -1), 255, (wide * 255 / 65535).round())
            image = Image.fromarray(grey.astype(np.uint8))
        elif "A" in image.mode or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def off(data: bytes) -> NDArray[np.int64]:
    """Return how far the pixels are from the reference's."""
    return np.abs(pixels.decode(data, GEOMETRY).astype(int) - np.asarray(REFERENCE(independent_decode(data))))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700))
def test_geometry_is_torchvisions_for_every_size(width: int, height: int) -> None:
    image = noise(width, height, width * 1000 + height)
    # A boxed resize rounds its filter's weights at another offset: a value may be on the other side of .5.
    assert np.abs(pixels.resize_crop(image, GEOMETRY).astype(int) - np.asarray(REFERENCE(image))).max() <= 1


@pytest.mark.parametrize(
    ("resize", "crop", "name"), [(224, 224, "bilinear"), (232, 224, "bicubic"), (64, 63, "lanczos")]
)
def test_other_geometries(resize: int, crop: int, name: str) -> None:
    mode = transforms.InterpolationMode(name)
    theirs = transforms.Compose([transforms.Resize(resize, mode), transforms.CenterCrop(crop)])
    image = noise(301, 200)
    difference = pixels.resize_crop(image, Geometry(resize, crop, name)).astype(int) - np.asarray(theirs(image))
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(
    ("geometry", "theirs"),
    [
        (Geometry(64, 40, width=56), [transforms.Resize(64), transforms.CenterCrop((40, 56))]),
        (Geometry(64, 56, width=40, interpolation="bicubic", fit="squash"), [transforms.Resize((56, 40), BICUBIC)]),
        (Geometry(1, 64, width=80, fit="centre"), [transforms.CenterCrop((64, 80))]),
        (Geometry(1, 64, width=80, fit="pad"), [lambda image: padded(image, 80, 64)]),
    ],
)
@pytest.mark.parametrize(("width", "height"), [(301, 200), (200, 301), (50, 40), (90, 50), (80, 64), (40, 100)])
def test_other_fits_are_torchvisions_and_pillows(
    geometry: Geometry, theirs: list[Callable[[Image.Image], Image.Image]], width: int, height: int
) -> None:
    image = noise(width, height)
    right = np.asarray(transforms.Compose(theirs)(image)).astype(int)
    assert np.abs(pixels.resize_crop(image, geometry) - right).max() <= 1
    assert pixels.decode(encoded(image), geometry).shape == (*geometry.shape, 3)


def test_a_strip_is_never_enlarged_to_its_full_length() -> None:
    # A resize of the whole strip would take 1.1 gigapixels.
    assert pixels.decode(encoded(Image.new("RGB", (50_000, 3), "red")), GEOMETRY).shape == (224, 224, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert off(encoded(noise(300, 200), "JPEG", quality=95, exif=exif)).max() <= 1


def test_transparency_is_white() -> None:
    half = Image.new("RGBA", (64, 64), (255, 0, 0, 128))
    assert pixels.decode(encoded(half), GEOMETRY)[100, 100].tolist() == pytest.approx([255, 127, 127], abs=1)
    grey = Image.new("LA", (64, 64), (0, 0))
    assert pixels.decode(encoded(grey), GEOMETRY).min() == 255
    palette = Image.new("P", (64, 64), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert pixels.decode(encoded(palette, transparency=1), GEOMETRY).min() == 255


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 256 * 256).astype(np.uint16).reshape(256, 256)
    row = pixels.decode(encoded(Image.fromarray(values)), Geometry(256, 256))[:, 128, 0].astype(int)
    assert (row[0], row[-1]) == (0, 255)
    assert row[128] == pytest.approx(128, abs=1)
    declared = encoded(Image.fromarray(np.full((64, 64), 4095, np.uint16)), "TIFF", tiffinfo={281: 4095})
    assert pixels.decode(declared, GEOMETRY).min() == 255


def test_a_missing_decoder_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake: what Pillow says of a compressed TIFF when it was built without libtiff."""

    def lacks(*_: object, **__: object) -> None:
        raise OSError("decoder libtiff not available")

    data = encoded(Image.new("RGB", (8, 8)), "TIFF", compression="tiff_lzw")
    monkeypatch.setattr("PIL.TiffImagePlugin.TiffImageFile.load", lacks)
    with pytest.raises(NotAnImage, match=r"TIFF pictures .*decoder libtiff not available"):
        pixels.decode(data, GEOMETRY)


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (b"", EmptyBody, "0 bytes"),
        (b"<html>", NotAnImage, "<html>"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", NotAnImage, "%!PS"),
        # Neither is what `curl -d` makes of a picture.
        ("ä".encode() * 600, NotAnImage, "the body starts with"),
        (b"<svg>" + "€".encode() * 400, NotAnImage, "the body is SVG"),
        (b"\x1f\x8b" + bytes(range(128, 256)), NotAnImage, "the body is compressed"),
        (b"\xff\xd8\xff\xe0", TruncatedImage, "JPEG picture's header"),
        (encoded(noise(64, 64))[:200], TruncatedImage, "PNG picture's pixels"),
        (encoded(noise(640, 640), "JPEG")[:5000], TruncatedImage, "JPEG picture's pixels"),
        (encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"), NotAnImage, "mode 'F'"),
    ],
)
def test_a_bad_picture_says_why(data: bytes, error: type[RequestError], words: str) -> None:
    with pytest.raises(error, match=words.replace("<", ".")) as caught:
        pixels.decode(data, GEOMETRY)
    assert "0x" not in str(caught.value)


def test_pixels_are_counted_before_they_are_decoded() -> None:
    bomb = encoded(Image.new("1", (4000, 4000)))
    with pytest.raises(TooManyPixels, match=r"4000 x 4000 picture has 16\.0 megapixels; the limit is 15"):
        pixels.decode(bomb, GEOMETRY, max_pixels=15_000_000, hold=_never)
    assert pixels.decode(bomb, GEOMETRY, max_pixels=16_000_000).shape == (224, 224, 3)


def test_a_gif_of_40_bytes_does_not_take_4_gigabytes() -> None:
    """Pillow draws its background while it opens the file, before any size can be read."""
    screen = b"GIF89a" + b"\xff\xff" * 2 + b"\x80\x01\x00" + b"\x00" * 3 + b"\xff" * 3
    control = b"!\xf9\x04\x08" + b"\x00" * 4
    bomb = screen + control + b"," + b"\x00" * 4 + b"\xff\xff" * 2 + b"\x00\x02\x02D\x01\x00;"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TooManyPixels, match=r"4294\.8 megapixels"):
        pixels.decode(bomb, GEOMETRY)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "kilobytes"


def _never(count: int) -> AbstractContextManager[object]:
    raise AssertionError(f"{count} pixels were about to be decoded")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_pictures_fail_in_their_own_tree(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"]))
    content = bytearray(encoded(noise(40, 30), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert pixels.decode(bytes(content[:cut]), GEOMETRY, max_pixels=1_000_000).shape == (224, 224, 3)
        except RequestError as error:
            assert 400 <= error.status < 500


@pytest.mark.shared
def test_every_awkward_picture_gets_the_references_pixels_or_a_4xx(shared_data: Path) -> None:
    decoded = refused = 0
    for path in sorted((shared_data / "awkward").rglob("*.*")):
        data = path.read_bytes()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pixels.decode(data, GEOMETRY)
        except RequestError as error:
            refused += 1
            assert 400 <= error.status < 500
            if not isinstance(error, TooManyPixels):
                with pytest.raises(Exception):  # noqa: B017, PT011 - whatever Pillow raises: it must fail too
                    independent_decode(data)
            continue
        decoded += 1
        assert off(data).max() <= 2, path.name
    assert decoded >= 40
    assert refused >= 10


SCALED = Geometry(256, 224, decoding="scaled")


@pytest.mark.parametrize(("size", "kind"), [((500, 333), "JPEG"), ((511, 900), "JPEG"), ((1200, 900), "PNG")])
def test_a_small_jpeg_and_a_png_are_decoded_in_full_either_way(size: tuple[int, int], kind: str) -> None:
    data = encoded(noise(*size), kind)
    assert np.array_equal(pixels.decode(data, SCALED), pixels.decode(data, GEOMETRY))


@pytest.mark.parametrize(
    ("size", "progressive", "orientation"),
    [((512, 700), False, 1), ((1031, 2057), False, 6), ((1031, 2057), True, 6), ((4032, 3024), True, 6)],
)
def test_a_large_jpeg_decoded_at_a_part_of_its_size_is_the_same_picture(
    size: tuple[int, int], progressive: bool, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    # As smooth as a photograph of so many pixels; a rotated or moved picture differs by 40 and more.
    picture = noise(160, 160).resize(size, Image.Resampling.BICUBIC)
    data = encoded(picture, "JPEG", quality=90, progressive=progressive, exif=exif)
    full, scaled = (pixels.decode(data, geometry).astype(int) for geometry in (GEOMETRY, SCALED))
    assert not np.array_equal(full, scaled)
    assert np.abs(full - scaled).mean() < 4


def test_a_large_picture_cut_off_is_refused_when_it_is_scaled_too() -> None:
    data = encoded(noise(1200, 900), "JPEG")
    with pytest.raises(TruncatedImage):
        pixels.decode(data[: len(data) // 2], SCALED)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("geometry", [GEOMETRY, SCALED], ids=["full", "scaled"])
def test_a_jpeg_without_its_end_is_read_if_no_line_is_missing(progressive: bool, geometry: Geometry) -> None:
    data = encoded(noise(700, 500), "JPEG", quality=90, progressive=progressive)
    right = pixels.decode(data, geometry)
    assert np.array_equal(pixels.decode(data[:-2], geometry), right)
    assert np.array_equal(pixels.decode(data[:-1], geometry), right)
    assert np.array_equal(np.asarray(pixels.open_rgb(data[:-2])), np.asarray(pixels.open_rgb(data)))
    # The whole last scan of a progressive picture, and more.
    last = len(data) - data.rindex(b"\xff\xda")
    for cut in (20, 100, 1000, last, last + 1, len(data) // 2, len(data) - 300):
        with pytest.raises(TruncatedImage):
            pixels.decode(data[:-cut], geometry)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_a_file_that_curl_has_changed_is_told_from_a_damaged_one(kind: str) -> None:
    stripped = encoded(noise(300, 200), kind).translate(None, b"\0\r\n")
    with pytest.raises(NotAnImage, match=r"`curl -T FILE` or `--data-binary @FILE`"):
        pixels.decode(stripped, GEOMETRY)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF", "TIFF", "MPO"])
def test_of_an_animation_or_several_pages_the_first_is_read(kind: str) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert pixels.decode(data, GEOMETRY)[100, 100].tolist() == pytest.approx([255, 0, 0], abs=8)
