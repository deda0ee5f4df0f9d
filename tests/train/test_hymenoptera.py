"""Zip files from outside: unpacked whole, or refused before a byte is written."""

from __future__ import annotations

import io
import stat
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest

from host.files import whole_folder
from train import hymenoptera
from train.errors import UnsafeArchive


def unzip(archive: Path, folder: Path, **limits: int) -> Path:
    """Unpack it as a download is: the folder appears whole or not at all."""
    with whole_folder(folder) as fresh:
        hymenoptera.unzip(archive, fresh, **limits)
    return folder


def refused(tmp_path: Path, data: bytes, match: str, **limits: int) -> None:
    archive, folder = tmp_path / "set.zip", tmp_path / "inside" / "set"
    archive.write_bytes(data)
    with pytest.raises(UnsafeArchive, match=match):
        unzip(archive, folder, **limits)
    assert [path.name for path in tmp_path.rglob("*")] in (["set.zip"], ["inside", "set.zip"], ["set.zip", "inside"])


def test_files_and_folders_come_out_as_they_went_in(tmp_path: Path, make_zip: Any) -> None:
    archive = tmp_path / "set.zip"
    archive.write_bytes(make_zip({"a/b/one.txt": b"one", "two.txt": b"two" * 1000}))
    folder = unzip(archive, tmp_path / "set")
    assert (folder / "a/b/one.txt").read_bytes() == b"one"
    assert (folder / "two.txt").read_bytes() == b"two" * 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "set.zip"]


def test_an_older_folder_is_replaced(tmp_path: Path, make_zip: Any) -> None:
    archive = tmp_path / "set.zip"
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "old").write_text("old")
    archive.write_bytes(make_zip({"new": b"new"}))
    assert [path.name for path in unzip(archive, tmp_path / "set").iterdir()] == ["new"]


@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/etc/evil", "C:/evil", "a\\..\\..\\evil", "a/b\\evil", "..", "good\0/../evil"]
)
def test_names_outside_the_folder_are_refused(tmp_path: Path, make_zip: Any, name: str) -> None:
    data = make_zip({"good": b"good", "X" * len(name): b"evil"})
    refused(tmp_path, data.replace(b"X" * len(name), name.encode()), "points outside the folder")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices_are_refused(tmp_path: Path, kind: int) -> None:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        entry = zipfile.ZipInfo("link")
        entry.external_attr = (kind | 0o777) << 16
        archive.writestr(entry, "/etc/passwd")
    refused(tmp_path, target.getvalue(), "'link', which is a link or a device")


def test_a_bomb_is_refused_by_what_it_declares(tmp_path: Path, make_zip: Any) -> None:
    refused(tmp_path, make_zip({"bomb": b"\0" * (4 << 20)}), r"claims to grow \d+-fold")


def test_a_bomb_that_lies_about_its_size_is_refused_while_it_unpacks(tmp_path: Path, make_zip: Any) -> None:
    data = bytearray(make_zip({"bomb": b"\0" * (4 << 20)}))
    # The size stands at offset 24 of the central directory's entry and at 22 of the local header.
    central = data.index(b"PK\x01\x02")
    for offset in (22, central + 24):
        assert struct.unpack_from("<I", data, offset) == (4 << 20,)
        struct.pack_into("<I", data, offset, 1000)
    refused(tmp_path, bytes(data), "cannot be unpacked|more bytes than it declares")


def test_limits_on_bytes_and_files(tmp_path: Path, make_zip: Any) -> None:
    data = make_zip({"one": b"1" * 600, "two": b"2" * 600})
    refused(tmp_path, data, "more than the limit of 1000 bytes", max_bytes=1000)
    refused(tmp_path, data, "holds 2 entries; the limit is 1", max_files=1)


def test_two_files_of_one_name_are_refused(tmp_path: Path, make_zip: Any) -> None:
    refused(tmp_path, make_zip({"Name": b"1", "name": b"2"}), "'name' twice")


def test_an_encrypted_file_is_refused(tmp_path: Path, make_zip: Any) -> None:
    data = bytearray(make_zip({"secret": b"secret"}))
    data[data.index(b"PK\x01\x02") + 8] |= 1
    refused(tmp_path, bytes(data), "'secret', which is encrypted")


@pytest.mark.parametrize("damage", [lambda data: b"no zip", lambda data: data[: len(data) // 2], lambda data: b""])
def test_a_damaged_file_is_refused(tmp_path: Path, make_zip: Any, damage: Any) -> None:
    refused(tmp_path, damage(make_zip({"one": b"1" * 5000})), "cannot be unpacked .*download it again")


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("one", b"1" * 5000)
    data = bytearray(target.getvalue())
    data[1000] ^= 1
    refused(tmp_path, bytes(data), "Bad CRC-32")
