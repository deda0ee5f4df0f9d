"""Small drawn pictures of every format, mode, orientation and geometry, and what they decode to."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from beeline import formats, pixels
from beeline.spec import Geometry

Arrays = dict[str, NDArray[np.uint8]]

# What they decoded to when `GEOMETRY` was raised last, for Pillows whose decoders round otherwise.
STORED = Path(__file__).with_name("drawn.npz")
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")
# The formats that say how a picture is turned.
TURNED = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF")
GEOMETRIES = {
    "": Geometry(20, 16),
    "crop all": Geometry(16, 16),
    "crop little": Geometry(30, 11, "bicubic"),
    "enlarge": Geometry(70, 16, "lanczos"),
    "scaled": Geometry(20, 16, decoding="scaled"),
    "scaled lanczos": Geometry(9, 8, "lanczos", "scaled"),
}
# Lossless where a format can be: encoders differ more than decoders.
_OPTIONS: dict[str, dict[str, object]] = {
    "JPEG": {"quality": 95},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    "TIFF": {"compression": "raw"},
}


def pictures() -> dict[str, bytes]:
    """Return encoded pictures by name, such as `PNG RGBA` or `JPEG turned 6`: all that this Pillow writes."""
    found = {f"{kind} {mode}": _written(kind, _drawn(mode)) for kind in formats.FORMATS for mode in MODES}
    for kind in TURNED:
        for turn in range(1, 9):
            # An object for each, since AVIF's writer takes the orientation out of it.
            exif = Image.Exif()
            exif[0x0112] = turn
            found[f"{kind} turned {turn}"] = _written(kind, _drawn("RGB"), exif=exif)
    found["JPEG progressive"] = _written("JPEG", _drawn("RGB"), progressive=True)
    found |= {f"{kind} I;16": _written(kind, _drawn("I;16")) for kind in ("PNG", "TIFF")}
    found["PNG clear"] = _written("PNG", _drawn("P"), transparency=96)
    found["TIFF darker white"] = _written("TIFF", _drawn("I;16"), tiffinfo={281: 40_000})
    return {name: data for name, data in found.items() if data is not None}


def decoded() -> Arrays:
    """Return what the pictures decode to, the coloured ones in every geometry."""
    found = {}
    for name, data in pictures().items():
        for kind, geometry in GEOMETRIES.items():
            if not kind or name.endswith((" RGB", "turned 6", "progressive")):
                found[f"{name} {kind}".strip()] = pixels.decode(data, geometry)
    return found


def digest(arrays: Arrays) -> str:
    """Return the sha256 over names, shapes and values."""
    whole = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        whole.update(f"{name} {array.shape}".encode() + array.tobytes())
    return whole.hexdigest()


def stored() -> Arrays:
    """Return the stored arrays."""
    with np.load(STORED) as found:
        return {name: found[name] for name in found.files}


def check_close(arrays: Arrays) -> None:
    """Compare with the stored arrays as another Pillow may differ: by 8 of 255 at most, by 0.6 on average."""
    expected = stored()
    unread = {name for name in expected if name.startswith(formats.LACKING)}
    assert arrays.keys() == expected.keys() - unread
    for name, array in arrays.items():
        off = np.abs(array.astype(int) - expected[name])
        assert (off.max() <= 8, off.mean() < 0.6) == (True, True), (name, off.max(), off.mean())


def _drawn(mode: str) -> Image.Image:
    """Draw 77 x 58 pixels: slopes in every channel, a soft blob, an edge."""
    y, x = np.mgrid[:58, :77].astype(float)
    blob = 120 * np.exp(-((x - 45) ** 2 + (y - 20) ** 2) / 200)
    channels = np.stack([x * 3, y * 4, 200 - x * 2 + y, 255 - y * 3], axis=-1) + blob[..., None]
    channels[40:, 50:] += (-60, 40, -30, -90)
    values = np.clip(channels, 0, 255).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray(values[..., 0].astype(np.uint16) * 150 + 77)
    whole = Image.fromarray(values, "CMYK" if mode == "CMYK" else "RGBA")
    if mode in ("RGBA", "CMYK"):
        return whole
    if mode == "P":
        # Few even steps and no dither, so that no version chooses other colours.
        return whole.convert("L").point(lambda value: value // 32 * 32).convert("P")
    return whole.convert("RGB").convert("1", dither=Image.Dither.NONE) if mode == "1" else whole.convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """Return a picture as a file of this format."""
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def _written(kind: str, image: Image.Image, **options: object) -> bytes | None:
    try:
        return encoded(image, kind, **{**_OPTIONS.get(kind, {}), **options})
    except (OSError, KeyError, ValueError):
        # Of no mode that this format has, or a format that this Pillow does not write.
        return None
