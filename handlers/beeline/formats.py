"""The accepted formats: their first bytes, and which of them this process's Pillow reads."""

from __future__ import annotations

import importlib
import importlib.util
import io
import re

import PIL
from PIL import Image, UnidentifiedImageError, features

from beeline.errors import NotAnImage

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
# Brands of an ISO base media file (ISO/IEC 14496-12), its own and those it is compatible with; `mif1` may be either.
_AVIF_BRANDS, _EITHER_BRANDS = {b"avif", b"avis"}, {b"mif1", b"msf1"}
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"}
# What else is sent as a picture, by its first bytes: its name, and what to do about it.
_NO = "which is not read here"
_SAVE = f"{_NO}; save it as JPEG or PNG"
CAMERA_RAW = f"a camera's raw file (DNG, CR2, NEF, ARW), {_NO}; develop it and save it as JPEG"
_OTHERS = {
    rb"\xff\x0a|\0\0\0\x0cJXL ": f"JPEG XL, {_SAVE}",
    rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  ": f"JPEG 2000, {_SAVE}",
    rb"8BPS": f"a Photoshop document (PSD), {_SAVE}",
    rb"II\*\0....CR|....ftypcrx |FUJIFILMCCD-RAW|IIRO|IIRS|IIU\0": CAMERA_RAW,
    rb"%PDF": f"PDF, {_NO}; render a page of it as JPEG or PNG",
    rb"\s*<(svg|(\?xml|!--|!doctype svg).{0,4000}<svg)": f"SVG, {_NO}; render it as PNG",
    rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ": f"a video (MP4 or alike), {_NO}; send one of its frames as JPEG or PNG",
    rb"\x1f\x8b|\x28\xb5\x2f\xfd|x[\x01\x9c\xda]": "compressed (Content-Encoding: gzip, say); send the picture itself",
}
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
# An extra package reads HEIC, as phones send it; it is imported with the first such picture.
_HEIC_PLUGIN = "pillow_heif"
READS_HEIC = importlib.util.find_spec(_HEIC_PLUGIN) is not None


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
    if data[4:8] == b"ftyp":
        end = min(int.from_bytes(data[:4], "big"), HEAD)
        brands = {data[8:12], *(data[at : at + 4] for at in range(16, end, 4))}
        if brands & _HEIC_BRANDS and not brands & _AVIF_BRANDS:
            return "HEIC"
        return "AVIF" if data[8:12] in _AVIF_BRANDS | _EITHER_BRANDS else None
    return None


def refuse_other(data: bytes) -> None:
    """Raise `NotAnImage` that names the format of these bytes, if they are of a known one that is not accepted."""
    for pattern, words in _OTHERS.items():
        if re.match(pattern, data, re.DOTALL | re.IGNORECASE):
            raise NotAnImage(f"the body is {words}")


def opened(kind: str, data: bytes) -> Image.Image:
    """Return a picture of this format with nothing decoded yet; raise what Pillow raises."""
    if kind == "HEIC":
        # A thumbnail is another picture, and the worker has as many threads as it was given.
        options = {"thumbnails": False, "depth_images": False, "aux_images": False, "decode_threads": 1}
        importlib.import_module(_HEIC_PLUGIN).register_heif_opener(**options)
        return Image.open(io.BytesIO(data), formats=("HEIF",))
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
