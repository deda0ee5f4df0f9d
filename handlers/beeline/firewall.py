"""Small files that cost much: refused by what their bytes declare, before Pillow opens them.

Pixels are not the only work of a decoder. Each limit is far over what cameras and editors write; a file of a few
megabytes over it took minutes or gigabytes.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import suppress

from beeline.errors import NotAnImage, TooMuchWork
from beeline.formats import CAMERA_RAW

# Progressive JPEGs have about ten; each walks over all coefficients (50,000 took minutes).
MAX_SCANS = 100
# Segments, and the bytes between them, which Pillow reads one by one in Python. No segment has more bytes.
MAX_SEGMENTS, MAX_FILL = 5_000, 65_536
MAX_CHUNKS = 20_000
# Strips or tiles of a TIFF, each an entry in a list (4 million took 1.3 GB).
MAX_STRIPS = 65_536
# Run-length coded BMP is decoded byte by byte in Python.
MAX_RLE_PIXELS = 4_000_000

# A JPEG's markers but those of restarts: inside entropy-coded data none but a 0 or a restart's number follows 0xFF.
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
_END, SCAN, _ALONE = 0xD9, 0xDA, (0x01, 0xD8, 0xD9)
# Start of a frame: all from C0 to CF but the tables DHT, JPG and DAC.
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_STRIPS = (273, 279, 324, 325)
# Raw files of cameras are TIFFs whose first picture is a reduced one, with the others below it; DNG has its own tag.
_SUBFILE, _BELOW, _DNG_VERSION, _REDUCED = 254, 330, 50706, 1
_SIZES = {3: "H", 4: "I", 16: "Q"}


def check(kind: str, data: bytes, max_pixels: int) -> tuple[int, bool]:
    """Refuse what would cost too much.

    Return the pixels that decoding holds beyond the picture's own size, or 0, and whether it is a JPEG without an end.

    `kind` is the format by its first bytes, as `JPEG`; `max_pixels` is the limit of a TIFF's tiles too.
    """
    if kind == "JPEG":
        return 0, not _has_end(data)
    if kind == "TIFF":
        return _tiff(data, max_pixels), False
    if kind == "PNG":
        _png(data)
    elif kind == "BMP":
        _bmp(data)
    return 0, False


def _has_end(data: bytes) -> bool:
    """Whether a JPEG ends. What follows its end, such as the video of a phone, is not counted."""
    scans = segments = 0
    for code, _, gap in markers(data):
        if code == _END and scans:
            return True
        scans, segments = scans + (code == SCAN), segments + 1
        _limit("JPEG", "scans", scans, MAX_SCANS)
        _limit("JPEG", "segments", segments, MAX_SEGMENTS)
        if not scans:
            _limit("JPEG", "fill bytes between segments", gap, MAX_FILL)
    return False


def has_every_scan(data: bytes) -> bool:
    """Whether the scans of a JPEG, the last of which may be cut off, are for all bits of all coefficients."""
    missing: set[tuple[int, int]] | None = None
    with suppress(IndexError):  # The data end in a header.
        for code, at, _ in markers(data):
            segment = data[at + 2 : at + 800]
            if code in FRAMES:
                missing = {(segment[6 + 3 * part], each) for part in range(segment[5]) for each in range(64)}
            elif code == SCAN and missing:
                parts, rest = segment[1::2][: segment[0]], segment[1 + 2 * segment[0] :]
                if not rest[2] & 15:
                    missing -= {(part, each) for part in parts for each in range(rest[0], rest[1] + 1)}
        return missing is not None and not missing
    return False


def markers(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield each marker's code, the position after it, and the count of bytes before it; at the data's end code 0."""
    position = 2
    while match := _MARKER.search(data, position):
        yield match[1][0], match.end(), match.start() - position
        position = match.end()
        if match[1][0] not in _ALONE:
            position += max(2, int.from_bytes(data[position : position + 2], "big"))
    yield 0, len(data), len(data) - position


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
    numbers, tags = {_TILE_WIDTH: 1, _TILE_LENGTH: 1, _SUBFILE: 0}, set[int]()
    try:
        (start,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
        (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, start)
        _limit("TIFF", "tags", count, MAX_SEGMENTS)
        first, size, length, at = (8, 20, "Q", 12) if big else (2, 12, "I", 8)
        for entry in range(start + first, start + first + count * size, size):
            tag, kind, values = struct.unpack_from(order + "HH" + length, data, entry)
            if tag in _STRIPS:
                _limit("TIFF", "strips or tiles", values, MAX_STRIPS)
            tags.add(tag)
            if tag in numbers and kind in _SIZES:
                (numbers[tag],) = struct.unpack_from(order + _SIZES[kind], data, entry + at)
    except struct.error:
        return 0
    if _DNG_VERSION in tags or (_BELOW in tags and numbers[_SUBFILE] == _REDUCED):
        raise NotAnImage(f"the body is {CAMERA_RAW}")
    area = numbers[_TILE_WIDTH] * numbers[_TILE_LENGTH]
    _limit("TIFF", "pixels in one tile", area, max_pixels)
    return area


def _limit(kind: str, what: str, found: int, limit: int) -> None:
    if found > limit:
        raise TooMuchWork(f"the {kind} picture has {found} {what}; the limit is {limit}: save it again more simply")
