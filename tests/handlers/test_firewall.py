"""Small files that would cost minutes or gigabytes are refused by their bytes; what cameras write passes."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path

import pytest
from PIL import Image

from beeline import firewall, pixels
from beeline.errors import RequestError, TooMuchWork
from beeline.spec import Geometry

GEOMETRY = Geometry(256, 224)


def encoded(kind: str, size: tuple[int, int] = (64, 64), **options: object) -> bytes:
    target = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(target, kind, **options)
    return target.getvalue()


def scan_bomb(scans: int) -> bytes:
    """Return a progressive JPEG whose last scan is repeated."""
    data = encoded("JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * scans + b"\xff\xd9"


def tiff(entries: list[tuple[int, int, int, int]], big: bool = False) -> bytes:
    """Return a TIFF of one directory, entries as (tag, type, count, value)."""
    if big:
        head = b"II+\x00\x08\x00\x00\x00" + struct.pack("<QQ", 16, len(entries))
        return head + b"".join(struct.pack("<HHQQ", *entry) for entry in entries) + bytes(64)
    head = b"II*\x00" + struct.pack("<IH", 8, len(entries))
    return head + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(64)


def rle_bomb() -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, 7000, 7000, 1, 8, 1, 10, 0, 0, 2, 2)
    return b"BM" + struct.pack("<IHHI", 200, 0, 0, 62) + header + bytes(8) + b"\x00\x00" * 7000 + b"\x00\x01"


SQUARE = [(256, 4, 1, 100), (257, 4, 1, 100)]
CASES = {
    "scans": (scan_bomb(200), r"2\d\d scans; the limit is 100"),
    "fill": (b"\xff\xd8" + b"\xff" * 1_500_000, "fill bytes"),
    "comments": (b"\xff\xd8" + b"\xff\xfe\x00\x02" * 300_000, "300000 segments"),
    "chunks": (encoded("PNG")[:33] + (struct.pack(">I", 0) + b"tEXt" + bytes(4)) * 25_000, "20001 chunks"),
    "run lengths": (rle_bomb(), "49000000 pixels"),
    "a giant tile": (tiff([*SQUARE, (322, 4, 1, 26_000), (323, 4, 1, 26_000)]), "676000000 pixels in one tile"),
    "a giant tile, big": (tiff([*SQUARE, (322, 4, 1, 26_000), (323, 4, 1, 26_000)], big=True), "676000000 pixels"),
    "strips": (tiff([*SQUARE, (273, 4, 4_000_000, 8)]), "4000000 strips"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_would_cost_too_much_is_refused_by_name(name: str) -> None:
    data, words = CASES[name]
    with pytest.raises(TooMuchWork, match=words):
        pixels.decode(data, GEOMETRY)


def test_a_tile_within_the_limit_counts_against_the_budget() -> None:
    assert firewall.check("TIFF", tiff([*SQUARE, (322, 3, 1, 4096), (323, 3, 1, 4096)]), 50_000_000) == 4096 * 4096


def test_what_editors_write_passes() -> None:
    for data in (
        encoded("JPEG", (2000, 1500), progressive=True, comment=b"\xff\xda" * 20),
        encoded("PNG", (2000, 1500)),
        encoded("TIFF", (2000, 1500), compression="tiff_lzw"),
        encoded("BMP"),
    ):
        assert pixels.decode(data, GEOMETRY).shape == (224, 224, 3)


@pytest.mark.shared
def test_every_real_picture_passes(shared_data: Path) -> None:
    seen = 0
    for path in sorted(shared_data.rglob("*.*")):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".avif", ".mpo"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    pixels.probe(path.read_bytes())
                except RequestError as error:
                    assert not isinstance(error, TooMuchWork), path
            seen += 1
    assert seen > 900
