"""A picture's bytes to uint8 RGB of the spec's geometry: one definition for training and serving.

The order is probe, decode, orient, RGB, resize, crop. Bytes and header are judged before anything is decoded.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from beeline import firewall, formats
from beeline.errors import EmptyBody, NotAnImage, RequestError, TooManyPixels, TruncatedImage
from beeline.formats import FORMATS
from beeline.settings import MAX_PIXELS
from beeline.spec import Geometry

# The version of this file, `formats` and `firewall`: raise it when a pixel changes, or when a picture that was read is
# refused, except other formats, named. A model that was exported with one version is not served with another.
GEOMETRY = 1

# Pillow's modes; earlier versions, such as Pillow-SIMD's, read a PNG of 16 bits as mode I.
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_TIFF_MAX_SAMPLE_VALUE = 281
_BAND_ROWS = 256
# The key, in a picture's `info`, of the pixels that its decoder holds besides the picture's own, as in a tile.
_HELD = "beeline_held"
# The key of a second reading of a JPEG that does not end, with other bytes after its own. Both give the same pixels if
# none comes from those bytes.
_TWIN, _PADS = "beeline_twin", (b"\0" * 64 + b"\xff\xd9", b"\xee" * 64 + b"\xff\xd9")
# Smooth filters only: with a step in the filter (nearest, box) the boxed resize and resize-then-crop may pick different
# source pixels.
_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

# What makes EXIF's orientations upright. Pillow's own function rewrites the EXIF block, which may be damaged.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Hold = Callable[[int], AbstractContextManager[object]]

# Some of Pillow's readers allocate a whole picture while they open the file (a GIF of 40 bytes: 4 GB). Before that,
# Pillow's own check warns over this number and raises over twice as much; between the two, `probe` judges the header.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def set_limit(max_pixels: int) -> None:
    """Set the limit of Pillow's own check to this process's limit."""
    Image.MAX_IMAGE_PIXELS = max_pixels


def decode(
    data: bytes, geometry: Geometry, max_pixels: int = MAX_PIXELS, hold: Hold = nullcontext
) -> NDArray[np.uint8]:
    """Turn one picture's bytes into `[crop, width, 3]` uint8 RGB.

    The header may declare at most `max_pixels`. The worker bounds its memory with `hold`: it is called with the number
    of pixels before they are decoded, and its context ends when they are freed.

    Raises:
        RequestError: one of its 4xx, with a sentence for the sender.
    """
    image = probe(data, max_pixels)
    # The decoder holds all coefficients of a progressive JPEG, however few pixels it makes.
    with hold(max(image.width * image.height, image.info.get(_HELD, 0))):
        if geometry.decoding == "scaled":
            _reduce(image, geometry.resize)
        small = resize_crop(_upright(image), geometry)
        # Freed before the hold ends, which returns large memory to the system.
        del image
    return small


def open_rgb(data: bytes, max_pixels: int = MAX_PIXELS, least: int | None = None) -> Image.Image:
    """Turn one picture's bytes into an upright RGB picture, for training; errors as `decode`.

    It has its full size, or where `least` is given and it is a JPEG, a half, a quarter or an eighth of it with at least
    `least` pixels a side.
    """
    image = probe(data, max_pixels)
    if least is not None:
        _reduce(image, least)
    return _upright(image).convert("RGB")


def probe(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Judge a picture by its first bytes and its header; nothing is decoded yet.

    Raises:
        EmptyBody: no bytes. NotAnImage: of no accepted format. TruncatedImage: an unreadable header. TooManyPixels:
            more than `max_pixels` declared. TooMuchWork: a structure that costs more than its pixels.
    """
    if not data:
        raise EmptyBody("the picture is 0 bytes long; send the bytes of one picture as the request's body")
    kind = formats.kind_of(data)
    if kind in (None, "TIFF"):
        formats.refuse_other(data)
    # Every format has zeros in its header, and bytes that are no text; the last may be cut off here.
    is_text = "\ufffd" not in data[:1000].decode("utf-8", "replace")[:-1]
    if len(data) >= 100 and not (is_text or b"\0" in data or b"\n" in data or b"\r" in data):
        raise NotAnImage(
            "the body has no line breaks and no zero bytes: `curl -d @FILE` takes them out of a file; send it with "
            "`curl -T FILE` or `--data-binary @FILE`"
        )
    if kind is None:
        raise NotAnImage(
            f"the body starts with {bytes(data[:12])!r}, which is none of {', '.join(FORMATS)}; send the bytes of one "
            'such picture as the body or as a file of a form, or its base64, alone or in JSON {"data": "<base64>"}'
        )
    if kind in formats.LACKING:
        raise _unread(kind, f"Pillow {PIL.__version__} without {kind}")
    if kind == "HEIC" and not formats.READS_HEIC:
        raise _unread(kind, "pillow-heif is not installed")
    held, endless = firewall.check(kind, data, max_pixels)
    try:
        if endless and firewall.has_every_scan(data):
            image, twin = (formats.opened(kind, data.rstrip(b"\xff") + pad) for pad in _PADS)
            image.info[_TWIN] = twin
        else:
            image = formats.opened(kind, data)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many(str(error).partition("(")[2].partition(" pixels")[0], "picture", max_pixels) from error
    except Exception as error:
        raise _broken(kind, "header", error) from error
    if image.width * image.height > max_pixels:
        raise _too_many(image.width * image.height, f"{image.width} x {image.height} picture", max_pixels)
    image.info[_HELD] = held
    return image


def placed(width: int, height: int, geometry: Geometry) -> tuple[int, int, int, int]:
    """Return width and height after the resize, and left and top of the cut in it, rounded as torchvision rounds.

    Left and top are negative where black goes around the picture.
    """
    short, (tall, broad) = geometry.resize, geometry.shape
    if geometry.fit == "squash":
        wide, high = broad, tall
    elif geometry.fit == "centre":
        wide, high = width, height
    elif geometry.fit == "pad":
        scale = min(broad / width, tall / height)
        wide, high = (max(1, round(side * scale)) for side in (width, height))
    elif width <= height:
        wide, high = short, int(short * height / width)
    else:
        wide, high = int(short * width / height), short
    left, top = (
        round((side - cut) / 2) if side >= cut else -((cut - side) // 2) for side, cut in ((wide, broad), (high, tall))
    )
    return wide, high, left, top


def orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 where there is none or the EXIF block is damaged."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # noqa: BLE001 - whatever a damaged EXIF block makes Pillow raise
        return 1


def resize_crop(image: Image.Image, geometry: Geometry) -> NDArray[np.uint8]:
    """Make `[crop, width, 3]` of a picture, as `geometry.fit` says.

    Size and offset are rounded as torchvision's `Resize` and `CenterCrop` round them. Both steps are one resize of the
    part that survives the crop, so that a strip of 2000 x 3 pixels does not become 170,667 x 256 first.
    """
    width, height = image.size
    tall, broad = geometry.shape
    wide, high, left, top = placed(width, height, geometry)
    first, upper, last, lower = max(left, 0), max(top, 0), min(left + broad, wide), min(top + tall, high)
    box = (
        first * width / wide,
        upper * height / high,
        min(last * width / wide, width),
        min(lower * height / high, height),
    )
    small = image.resize((last - first, lower - upper), _FILTERS[geometry.interpolation], box=box)
    small = small if small.mode == "RGB" else small.convert("RGB")
    if small.size != (broad, tall):
        around = Image.new("RGB", (broad, tall))
        around.paste(small, (first - left, upper - top))
        small = around
    return np.asarray(small)


def _reduce(image: Image.Image, least: int) -> None:
    """Let a JPEG be decoded at a half, a quarter or an eighth of its size, with at least `least` pixels a side."""
    for each in (image, image.info.get(_TWIN)):
        if each is not None:
            each.draft(None, (least, least))


def _checksum(image: Image.Image) -> int:
    """Decode a picture and return a checksum of its pixels, a band at a time."""
    found = 0
    for top, bottom in _bands(image.height):
        found = zlib.crc32(image.crop((0, top, image.width, bottom)).tobytes(), found)
    return found


def _upright(image: Image.Image) -> Image.Image:
    """Decode, turn as EXIF says, and make opaque: mode RGB, or L where there is no colour."""
    kind = image.format or "picture"
    try:
        # In one line, since its pixels are freed after it.
        expected = _checksum(image.info.pop(_TWIN)) if _TWIN in image.info else None
        image.load()
        if expected is not None and _checksum(image) != expected:
            raise OSError("image file is truncated")
    except Exception as error:
        raise _broken(kind, "pixels", error) from error
    # `load` rotates a TIFF by its own tag; Pillow then removes the tag, Pillow-SIMD leaves it.
    turned = 0x0112 in getattr(image, "tag_v2", {})
    turn = None if turned else _TURNS.get(orientation(image))
    try:
        if turn is not None:
            image = image.transpose(turn)
        return _opaque(image, kind)
    except RequestError:
        raise
    except Exception as error:
        raise _broken(kind, "colours", error) from error


def _opaque(image: Image.Image, kind: str) -> Image.Image:
    """Turn any mode into RGB or L: transparency over white, 16 bits scaled from their declared range."""
    if image.mode in _SIXTEEN_BITS or (image.mode, kind) == ("I", "PNG"):
        return _from_sixteen_bits(image)
    if image.mode in ("I", "F"):
        raise NotAnImage(
            f"the picture's pixels are 32-bit numbers (mode {image.mode!r}) that do not declare what white is; "
            "save it with 8 or 16 bits a channel"
        )
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _over_white(image)
    return image if image.mode in ("RGB", "L") else image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    """Composite over white, a band at a time: a whole copy of 50 megapixels takes 200 MB."""
    white = Image.new("RGB", image.size, "white")
    for top, bottom in _bands(image.height):
        band = image.crop((0, top, image.width, bottom)).convert("RGBA")
        white.paste(band, (0, top), band)
    return white


def _from_sixteen_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow's own conversion clips everything over 255 to white."""
    declared = getattr(image, "tag_v2", {}).get(_TIFF_MAX_SAMPLE_VALUE, 65535)
    top_value = max(1, int(declared[0] if isinstance(declared, tuple) else declared))
    clear = image.info.get("transparency")
    grey = Image.new("L", image.size)
    for top, bottom in _bands(image.height):
        values = np.asarray(image.crop((0, top, image.width, bottom))).astype(np.uint32)
        scaled = (np.minimum(values, top_value) * 255 + top_value // 2) // top_value
        if isinstance(clear, int):
            scaled[values == clear] = 255
        grey.paste(Image.fromarray(scaled.astype(np.uint8)), (0, top))
    return grey


def _bands(height: int) -> Iterator[tuple[int, int]]:
    for top in range(0, height, _BAND_ROWS):
        yield top, min(top + _BAND_ROWS, height)


def _too_many(pixels: int | str, what: str, limit: int) -> TooManyPixels:
    return TooManyPixels(
        f"the {what} has {int(pixels) / 1e6:.1f} megapixels; the limit is {limit / 1e6:g}: scale it down before sending"
    )


def _unread(kind: str, why: str) -> NotAnImage:
    return NotAnImage(f"{kind} pictures of this kind cannot be read here ({why}); send it as JPEG or PNG")


def _broken(kind: str, part: str, error: Exception) -> RequestError:
    if str(error).endswith("not available"):
        # Such as "decoder libtiff not available".
        return _unread(kind, f"Pillow {PIL.__version__}, {error}")
    # Pillow's "cannot identify" names a memory address and no cause.
    unknown = isinstance(error, UnidentifiedImageError) or not str(error)
    why = "no valid header" if unknown else " ".join(str(error).split())[:160]
    return TruncatedImage(
        f"the {kind} picture's {part} cannot be read ({why}); it is cut off or damaged, send it again whole"
    )
