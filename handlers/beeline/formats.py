"""The accepted formats: their first bytes, and which of them this process's Pillow reads."""

from __future__ import annotations

import importlib
import importlib.util
import io

import PIL
from PIL import Image, UnidentifiedImageError, features

# Pillow reads many more. Refused are those that run other programs (EPS), those with a poor security record (JPEG 2000,
# FLI), and those that come neither from cameras nor from the web.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF")
# How many first bytes tell every format.
HEAD = 64
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
)
# Pillow-SIMD is a Pillow of 2023, which needs this plugin for AVIF.
_AVIF_PLUGIN = "pillow_avif"
_EXIF = b"Exif\0\0"


def lacking() -> tuple[str, ...]:
    """Return the formats that the Pillow of this process was built without."""
    found = [] if features.check("webp") else ["WEBP"]
    if importlib.util.find_spec("PIL.AvifImagePlugin") is not None:
        return (*found, *(() if features.check("avif") else ("AVIF",)))
    try:
        importlib.import_module(_AVIF_PLUGIN)
    except ImportError:
        found.append("AVIF")
    return tuple(found)


LACKING = lacking()


def pillow_version() -> str:
    """Return the version of PIL, its libjpeg, and the formats that it lacks: `13.0.0 with libjpeg-turbo`."""
    turbo = features.check_feature("libjpeg_turbo")
    without = f", without {' and '.join(LACKING)}" if LACKING else ""
    return f"{PIL.__version__} with {'libjpeg-turbo' if turbo else 'libjpeg'}{without}"


def kind_of(data: bytes) -> str | None:
    """Return the accepted format that these first bytes announce, or None."""
    for magic, kind in _MAGIC:
        if data.startswith(magic):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis", b"mif1", b"msf1"):
        return "AVIF"
    return None


def opened(kind: str, data: bytes) -> Image.Image:
    """Return a picture of this format with nothing decoded yet; raise what Pillow raises."""
    try:
        return Image.open(io.BytesIO(data), formats=(kind,))
    except UnidentifiedImageError:
        if kind != "JPEG" or _EXIF not in data:
            raise
        # The EXIF block is damaged. Pillow ignores it under another name; `pixels` still reads its orientation.
        image = Image.open(io.BytesIO(data.replace(_EXIF, _EXIF.lower())), formats=(kind,))
        blocks = [block for _, block in getattr(image, "applist", ()) if block.startswith(_EXIF.lower())]
        image.info["exif"] = _EXIF + b"".join(block[len(_EXIF) :] for block in blocks)
        return image
