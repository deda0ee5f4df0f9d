"""Small files that cost minutes or gigabytes are refused by their bytes; pictures of cameras pass."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beeline import firewall, pixels
from beeline.errors import RequestError, TooMuchWork
from beeline.spec import Geometry
from tests.handlers.drawn import encoded
from train.data import SUFFIXES

GEOMETRY = Geometry(256, 224)


def gradient(kind: str, size: tuple[int, int] = (64, 64), **options: object) -> bytes:
    return encoded(Image.linear_gradient("L").resize(size).convert("RGB"), kind, **options)


def scan_bomb(scans: int) -> bytes:
    """Return a progressive JPEG whose last scan is repeated."""
    data = gradient("JPEG", progressive=True)
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
    "scans": (scan_bomb(200), "101 scans; the limit is 100"),
    "scans after tables": (scan_bomb(200)[:2] + b"\xff\xd9" + scan_bomb(200), "101 scans; the limit is 100"),
    "fill": (b"\xff\xd8\xff\xe0\0\2" + b"\xff" * 1_500_000, "fill bytes"),
    "zeros": (b"\xff\xd8\xff\xe0\0\2" + bytes(70_000) + scan_bomb(1)[2:], "70000 fill bytes"),
    "comments": (b"\xff\xd8" + b"\xff\xfe\x00\x02" * 300_000, "5001 segments"),
    "chunks": (gradient("PNG")[:33] + (struct.pack(">I", 0) + b"tEXt" + bytes(4)) * 25_000, "20001 chunks"),
    "run lengths": (rle_bomb(), "49000000 pixels"),
    "a giant tile": (tiff([*SQUARE, (322, 4, 1, 26_000), (323, 4, 1, 26_000)]), "676000000 pixels in one tile"),
    "a giant tile, big": (tiff([*SQUARE, (322, 4, 1, 26_000), (323, 4, 1, 26_000)], big=True), "676000000 pixels"),
    "strips": (tiff([*SQUARE, (273, 4, 4_000_000, 8)]), "4000000 strips"),
}


@pytest.mark.parametrize(("data", "words"), CASES.values(), ids=CASES)
def test_a_costly_file_is_refused_by_name(data: bytes, words: str) -> None:
    with pytest.raises(TooMuchWork, match=words):
        pixels.decode(data, GEOMETRY)


# Video of a phone, a second picture (MPO), and what a panorama's camera adds.
BEHIND = {
    "video": b"\0\0\0\x18ftypmp42" + b"\xff\xda\0\x08" * 141,
    "picture": scan_bomb(200),
    "raw data": bytes(range(256)) * 4000 + b"\xff\xe1\0\2" * 6000,
    "zeros": bytes(100_000),
}


@pytest.mark.parametrize("behind", BEHIND.values(), ids=BEHIND)
@pytest.mark.parametrize("progressive", [False, True])
def test_what_lies_behind_a_jpeg_changes_nothing(behind: bytes, progressive: bool) -> None:
    data = gradient("JPEG", progressive=progressive)
    assert np.array_equal(pixels.decode(data + behind, GEOMETRY), pixels.decode(data, GEOMETRY))


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_is_cut_anywhere_has_not_every_scan(progressive: bool) -> None:
    data = gradient("JPEG", (16, 16), progressive=progressive)
    last = data.rindex(b"\xff\xda") + 2
    cut = [length for length in range(4, len(data)) if firewall.has_every_scan(data[:length])]
    assert cut == list(range(last + int.from_bytes(data[last : last + 2], "big"), len(data)))


def test_a_tile_within_the_limit_counts_against_the_budget() -> None:
    assert firewall.check("TIFF", tiff([*SQUARE, (322, 3, 1, 4096), (323, 3, 1, 4096)]), 50_000_000) == (
        4096 * 4096,
        False,
    )


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"progressive": True, "comment": b"\xff\xda" * 20}),
        ("PNG", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("BMP", {}),
    ],
)
def test_a_picture_of_an_editor_passes(kind: str, options: dict[str, object]) -> None:
    assert pixels.decode(gradient(kind, (2000, 1500), **options), GEOMETRY).shape == (224, 224, 3)


@pytest.mark.shared
def test_every_real_picture_passes(shared_data: Path) -> None:
    paths = [path for path in shared_data.rglob("*.*") if path.suffix.lower() in SUFFIXES]
    assert len(paths) > 900
    for path in paths:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                pixels.probe(path.read_bytes())
            except RequestError as error:
                assert not isinstance(error, TooMuchWork), path
