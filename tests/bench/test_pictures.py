"""Pictures to send: what is read, in which order, and the digest that tells two sets apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from archive import mar
from beeline.errors import BeelineError, ConfigError
from bench import pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b/2.jpg", "a/1.PNG", "a/3.jpeg", "a/notes.txt", "c/4.webp"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path


def test_a_folder_is_read_sorted_and_without_other_files(folder: Path) -> None:
    read = pictures.read(folder)
    assert read.names == ("1.PNG", "3.jpeg", "2.jpg", "4.webp")
    assert read.bodies == (b"a/1.PNG", b"a/3.jpeg", b"b/2.jpg", b"c/4.webp")
    said = read.to_dict()
    assert said["source"] == folder.name
    assert (said["count"], said["bytes"]) == (4, 8)
    assert str(folder) not in str(said)


def test_some_of_a_folder_are_taken_from_all_over_it_and_a_file_is_read_whatever_its_name(folder: Path) -> None:
    assert pictures.read(folder, most=2).names == ("1.PNG", "2.jpg")
    assert pictures.read(folder, most=9) == pictures.read(folder)
    assert pictures.read(folder / "a/notes.txt").bodies == (b"a/notes.txt",)


def test_equal_digests_are_equal_pictures_in_the_same_order(folder: Path) -> None:
    one, again = pictures.read(folder), pictures.read(folder)
    turned = pictures.Pictures(one.source, one.names[::-1], one.bodies[::-1])
    glued = pictures.Pictures(one.source, one.names[:1], (b"".join(one.bodies),))
    digests = [each.to_dict()["sha256"] for each in (one, again, turned, glued)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_missing_pictures_are_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BeelineError, match="is not there"):
        pictures.read(folder / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BeelineError, match="no picture below"):
        pictures.read(tmp_path / "empty")


def test_golden_pictures_are_the_default(folder: Path, colour_archive: Path) -> None:
    archive = mar.read(colour_archive)
    assert pictures.choose(None, None, archive).names == ("0.png", "1.png")
    assert pictures.choose(None, folder, archive, most=2).names == ("1.PNG", "2.jpg")
    for picture, archive_or_none in ((folder, archive), (folder, None), (None, None)):
        with pytest.raises(ConfigError, match="one picture with --picture, or a folder with --pictures"):
            pictures.choose(picture, picture, archive_or_none)
