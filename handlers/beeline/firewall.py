"""Small files that cost much: refused by what their bytes declare, before Pillow opens them.

Pixels are not the only work of a decoder. Each limit is far over what cameras and editors write; a file of a few
megabytes over it took minutes or gigabytes.
"""

from __future__ import annotations

import struct

from beeline.errors import TooMuchWork

# Progressive JPEGs have about ten; each walks over all coefficients (50,000 took minutes).
MAX_SCANS = 100
# Markers outside the entropy-coded data, which Pillow reads one by one in Python.
MAX_SEGMENTS = 5_000
MAX_CHUNKS = 20_000
# Strips or tiles of a TIFF, each an entry in a list (4 million took 1.3 GB).
MAX_STRIPS = 65_536
# Run-length coded BMP is decoded byte by byte in Python.
MAX_RLE_PIXELS = 4_000_000

# No JPEG segment is longer, so a longer run of fill bytes is nothing but fill.
_LONGEST_FILL = b"\xff" * 65_536
_MANY_SEGMENTS_BYTES = 1_000_000
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_STRIPS = (273, 279, 324, 325)
_SIZES = {3: "H", 4: "I", 16: "Q"}


def check(kind: str, data: bytes, max_pixels: int) -> int:
    """Refuse what would cost too much; return the pixels that decoding holds beyond the picture's own size, or 0.

    `kind` is the format by its first bytes, as `JPEG`; `max_pixels` is the limit of a TIFF's tiles too.
    """
    if kind == "JPEG":
        _jpeg(data)
    elif kind == "PNG":
        _png(data)
    elif kind == "BMP":
        _bmp(data)
    elif kind == "TIFF":
        return _tiff(data, max_pixels)
    return 0


def _jpeg(data: bytes) -> None:
    # Inside entropy-coded data 0xFF is followed by 0 or a restart marker, so this counts scans alone.
    _limit("JPEG", "scans", data.count(b"\xff\xda"), MAX_SCANS)
    if len(data) < _MANY_SEGMENTS_BYTES:
        return
    if _LONGEST_FILL in data:
        raise TooMuchWork("the JPEG picture has over 65,536 fill bytes in a row; save it again without them")
    segments = sum(data.count(bytes((0xFF, code))) for code in (0xFE, *range(0xE0, 0xF0)))
    _limit("JPEG", "segments", segments, MAX_SEGMENTS)


def _png(data: bytes) -> None:
    position, chunks = 8, 0
    while position + 8 <= len(data):
        position += 12 + int.from_bytes(data[position : position + 4], "big")
        chunks += 1
        _limit("PNG", "chunks", chunks, MAX_CHUNKS)


def _bmp(data: bytes) -> None:
    if len(data) < 34 or int.from_bytes(data[30:34], "little") not in (1, 2):
        return
    width, height = struct.unpack_from("<ii", data, 18)
    _limit("run-length coded BMP", "pixels", abs(width * height), MAX_RLE_PIXELS)


def _tiff(data: bytes, max_pixels: int) -> int:
    """Read the first directory's entries; Pillow refuses damaged ones."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\x00", b"\x00+")
    tile = {_TILE_WIDTH: 1, _TILE_LENGTH: 1}
    try:
        (start,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
        (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, start)
        _limit("TIFF", "tags", count, MAX_SEGMENTS)
        first, size, length, at = (8, 20, "Q", 12) if big else (2, 12, "I", 8)
        for entry in range(start + first, start + first + count * size, size):
            tag, kind, values = struct.unpack_from(order + "HH" + length, data, entry)
            if tag in _STRIPS:
                _limit("TIFF", "strips or tiles", values, MAX_STRIPS)
            if tag in tile and kind in _SIZES:
                (tile[tag],) = struct.unpack_from(order + _SIZES[kind], data, entry + at)
    except struct.error:
        return 0
    area = tile[_TILE_WIDTH] * tile[_TILE_LENGTH]
    _limit("TIFF", "pixels in one tile", area, max_pixels)
    return area


def _limit(kind: str, what: str, found: int, limit: int) -> None:
    if found > limit:
        raise TooMuchWork(f"the {kind} picture has {found} {what}; the limit is {limit}: save it again more simply")
