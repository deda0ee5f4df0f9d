"""The cache of decoded pictures: the same pixels, less work, a bound, and nothing old or damaged."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import train.cache
from train.cache import Cache

SIDE = 10
BYTES = SIDE * SIDE * 3


class Decoder:
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, data: bytes) -> NDArray[np.uint8]:
        self.calls += 1
        return np.full((SIDE, SIDE, 3), data[0], np.uint8)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture"
    path.write_bytes(b"\x07")
    return path


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def test_a_picture_is_decoded_once_for_each_kind_also_by_a_later_process(picture: Path, tmp_path: Path) -> None:
    decode, folder = Decoder(), tmp_path / "cache"
    for cache in (Cache(10_000, folder), Cache(10_000, folder)):
        for kind in ("one", "other", "one"):
            assert np.array_equal(cache.get(picture, kind, decode), np.full((SIDE, SIDE, 3), 7))
    assert decode.calls == len(entries(folder)) == 2


def test_a_changed_file_is_decoded_again_and_takes_no_more_room(picture: Path, tmp_path: Path) -> None:
    decode, cache = Decoder(), Cache(10_000, tmp_path / "cache")
    cache.get(picture, "one", decode)
    before = picture.stat()
    picture.write_bytes(b"\x08")
    os.utime(picture, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert cache.get(picture, "one", decode)[0, 0, 0] == 8
    assert (decode.calls, len(entries(tmp_path / "cache"))) == (2, 1)


@pytest.mark.parametrize("damage", [lambda text: text[:-1], lambda text: text[:-1] + b"\x00", lambda text: b"", bytes])
def test_a_damaged_entry_is_not_used(picture: Path, tmp_path: Path, damage: object) -> None:
    decode, cache = Decoder(), Cache(10_000, tmp_path / "cache")
    cache.get(picture, "one", decode)
    (entry,) = entries(tmp_path / "cache")
    good = entry.read_bytes()
    entry.write_bytes(damage(good))  # type: ignore[operator]
    assert cache.get(picture, "one", decode)[-1, -1, -1] == 7
    assert decode.calls == 1 + (damage is not bytes)
    assert entry.read_bytes() == good


def test_the_bound_holds_and_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    decode, folder = Decoder(), tmp_path / "cache"
    pictures = [tmp_path / str(number) for number in range(6)]
    for number, path in enumerate(pictures):
        path.write_bytes(bytes([number]))
    cache = Cache(4 * BYTES, folder)
    for path in pictures:
        cache.get(path, "one", decode)
    assert len(entries(folder)) == 4
    for path in pictures:
        cache.get(path, "one", decode)
    assert decode.calls == 8, "four were kept, and nothing pushed them out"
    for age, path in enumerate(entries(folder)):
        os.utime(path, (1000 + age, 1000 + age))
    newest = entries(folder)[-2:]
    Cache(3 * BYTES, folder)
    assert entries(folder) == newest


def test_processes_share_the_room(tmp_path: Path) -> None:
    decode, paths = Decoder(), [tmp_path / "a", tmp_path / "b"]
    cache = Cache(BYTES * 3 // 2, tmp_path / "cache")
    for path in paths:
        path.write_bytes(b"x")
        # A process of a loader, which is new in each epoch, has a copy.
        copy.copy(cache).get(path, "one", decode)
    assert len(entries(tmp_path / "cache")) == 1


def test_without_room_or_on_a_full_disk_pictures_are_decoded(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Decoder()
    for _ in range(2):
        Cache(0, tmp_path / "none").get(picture, "one", decode)
    assert (decode.calls, entries(tmp_path / "none")) == (2, [])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.cache, "write_whole", full)
    assert Cache(10_000, tmp_path / "full").get(picture, "one", decode)[0, 0, 0] == 7
    with pytest.raises(FileNotFoundError):
        Cache(10_000, tmp_path / "full").get(tmp_path / "missing", "one", decode)
