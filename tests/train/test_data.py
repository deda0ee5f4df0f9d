"""Picture folders: found in order, read, split, and refused with a sentence."""

from __future__ import annotations

import io
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beeline.errors import BeelineError
from train import data, hymenoptera
from train.data import find_data, labelled_pictures, read
from train.errors import DataError, DownloadError
from train.generate import generate
from train.progress import silent


@pytest.fixture
def folder(tmp_path: Path, drawn: Path) -> Path:
    return Path(shutil.copytree(drawn, tmp_path / "set"))


def test_two_halves_are_read_with_sorted_labels(folder: Path) -> None:
    found = read(folder)
    assert found.labels == ("circles", "stripes")
    assert found.train.counts() == {"circles": 8, "stripes": 8}
    assert found.val.counts() == {"circles": 4, "stripes": 4}
    assert found.name == "set"
    assert not found.generated
    assert all(picture.path.parent.name == found.labels[picture.truth] for picture in found.train.pictures)


@pytest.mark.parametrize(("train", "val"), [("training", "validation"), ("train", "valid")])
def test_other_names_of_the_halves(folder: Path, train: str, val: str) -> None:
    (folder / "train").rename(folder / train)
    (folder / "val").rename(folder / val)
    assert read(folder).split == f"the folders {train}/ and {val}/"


def test_a_wrapping_folder_is_looked_through(folder: Path) -> None:
    assert read(folder.parent).name == "set"
    assert len(read(folder.parent).val) == 8


@pytest.mark.parametrize("below", ["train", ""])
def test_a_single_image_folder_is_split_the_same_way_every_time(folder: Path, below: str) -> None:
    shutil.rmtree(folder / "val")
    first, second = read(folder / below, 0.25), read(folder / below, 0.25)
    assert first.val.counts() == {"circles": 2, "stripes": 2}
    assert first.train.counts() == {"circles": 6, "stripes": 6}
    assert {p.path for p in first.train.pictures}.isdisjoint(p.path for p in first.val.pictures)
    assert first.val.pictures == second.val.pictures
    assert first.split == "25% of each class held out"


def test_the_split_does_not_depend_on_where_the_folder_lies(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "train", tmp_path / "elsewhere")
    names = [[p.path.name for p in read(root).val.pictures] for root in (folder / "train", tmp_path / "elsewhere")]
    assert names[0] == names[1]


def test_what_is_no_photograph_by_name_is_left_out_and_named(folder: Path) -> None:
    for name in ("train/circles/sign.gif", "train/circles/notes.txt", "val/stripes/.DS_Store", "train/list.csv"):
        (folder / name).write_text("x")
    said: list[str] = []
    found = find_data(folder, said.append, environ={})
    assert len(found.train) == 16
    assert said[-1].startswith("data: 4 files are no photograph by name and left out: ")
    assert "sign.gif" in said[-1]
    assert said[-1].endswith(" and 1 more")


def test_the_digest_follows_content_and_name(folder: Path) -> None:
    before = read(folder).digest
    assert read(folder).digest == before
    (folder / "train/circles/000.png").rename(folder / "train/circles/xxx.png")
    renamed = read(folder).digest
    assert renamed != before
    (folder / "train/circles/xxx.png").write_bytes((folder / "train/stripes/000.png").read_bytes())
    assert read(folder).digest not in (before, renamed)


def empty_class(folder: Path) -> None:
    shutil.rmtree(folder / "train/circles")
    (folder / "train/circles").mkdir()


def one_class(folder: Path) -> None:
    shutil.rmtree(folder / "train/circles")


def class_in_one_half(folder: Path) -> None:
    shutil.copytree(folder / "train/circles", folder / "train/squares")


def no_training_half(folder: Path) -> None:
    shutil.rmtree(folder / "train")


def not_a_picture(folder: Path) -> None:
    (folder / "val/circles/000.png").write_text("hello")


def no_class_folders(folder: Path) -> None:
    for path in sorted(folder.rglob("*.png")):
        path.rename(folder / f"{path.parent.name}{path.parent.parent.name}{path.name}")
    shutil.rmtree(folder / "train")
    shutil.rmtree(folder / "val")


def one_picture(folder: Path) -> None:
    shutil.rmtree(folder / "val")
    for path in sorted((folder / "train/circles").iterdir())[1:]:
        path.unlink()


def missing(folder: Path) -> None:
    shutil.rmtree(folder)


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("x")


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (missing, r"the data folder \S*/set is missing; name a folder"),
        (a_file, r"the data folder \S*/set is a file, not a folder; name a folder"),
        (empty_class, r"the class folder \S*/train/circles has no pictures \(\.jpg.*\); add some"),
        (one_class, r"\S*/train has only the class folder 'stripes'; a classifier needs"),
        (no_class_folders, r"\S*/set has no class folders; a classifier needs"),
        (class_in_one_half, r"has the class 'squares' in only one of train/ and val/; give both"),
        (no_training_half, r"has val/ but no train/; add it"),
        (not_a_picture, r"a picture cannot be read: \S*/val/circles/000\.png: the body starts with b'hello'"),
        (one_picture, r"the class 'circles' has one picture only; training and validation need one each"),
    ],
)
def test_every_bad_folder_has_its_sentence(folder: Path, break_it: Callable[[Path], None], sentence: str) -> None:
    break_it(folder)
    with pytest.raises(DataError, match=sentence) as caught:
        read(folder)
    assert "\n" not in str(caught.value)


def test_evaluation_takes_the_validation_half_broken_pictures_included(folder: Path) -> None:
    not_a_picture(folder)
    assert labelled_pictures(folder).counts() == {"circles": 4, "stripes": 4}
    assert labelled_pictures(folder / "train").counts() == {"circles": 8, "stripes": 8}


def test_the_option_beats_the_environment(folder: Path, tmp_path: Path) -> None:
    found = find_data(folder, silent, cache=tmp_path, environ={"BEELINE_DATA": str(tmp_path / "missing")})
    assert found.name == "set"
    with pytest.raises(DataError, match="missing"):
        find_data(None, silent, cache=tmp_path, environ={"BEELINE_DATA": str(tmp_path / "missing")})


def test_without_a_network_generated_pictures_are_used_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "generate", lambda cache: generate(cache, train=2, val=1))
    said: list[str] = []
    found = find_data(None, said.append, cache=tmp_path, environ={"BEELINE_DATA_URL": "http://127.0.0.1:1/set.zip"})
    assert found.generated
    assert found.labels == ("circles", "stripes")
    assert any("cannot be reached" in line for line in said)
    assert any("GENERATED pictures" in line and "no photographs" in line for line in said)


def test_generated_pictures_are_drawn_whatever_there_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "generate", lambda cache: generate(cache, train=2, val=1))
    monkeypatch.setattr(hymenoptera, "get", lambda *_: pytest.fail("pictures were looked for"))
    said: list[str] = []
    found = find_data(None, said.append, cache=tmp_path, environ={"BEELINE_DATA": str(folder)}, generated=True)
    assert (found.generated, found.labels, len(found.train)) == (True, ("circles", "stripes"), 4)
    assert "GENERATED pictures" in said[0]
    assert "as asked for" in said[0]


@pytest.fixture
def archive(drawn: Path, make_zip: Any, server: Any) -> Any:
    """The server holds a zip of the drawn set as .jpg names, whose digest is the one expected."""
    files = {
        f"hymenoptera_data/{p.relative_to(drawn).with_suffix('.jpg')}": p.read_bytes() for p in drawn.rglob("*.png")
    }
    server.content = make_zip(files)
    return server


def test_the_downloaded_set_is_verified_by_its_pictures(
    archive: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {"BEELINE_DATA_URL": archive.url}
    with pytest.raises(
        DownloadError, match=r"are not the known 397 of hymenoptera_data .*BEELINE_DATA_SHA256=[0-9a-f]{64}$"
    ):
        find_data(None, silent, cache=tmp_path, environ=environ)
    assert not list(tmp_path.glob("hymenoptera*"))
    folder = tmp_path / "copy"
    zipfile.ZipFile(io.BytesIO(archive.content)).extractall(folder)
    monkeypatch.setattr(hymenoptera, "PICTURES_SHA256", hymenoptera.digest(folder))
    found = find_data(None, silent, cache=tmp_path, environ=environ)
    assert (found.name, found.generated, len(found.train), len(found.val)) == ("hymenoptera_data", False, 16, 8)
    asked = len(archive.seen)
    find_data(None, silent, cache=tmp_path, environ=environ)
    assert len(archive.seen) == asked, "what is there is not downloaded again"


def test_a_portals_page_does_not_stand_in_the_way_of_the_next_download(archive: Any, tmp_path: Path) -> None:
    good, archive.content = archive.content, b"<html>sign in first</html>"
    with pytest.raises(DataError):
        find_data(None, silent, cache=tmp_path, environ={"BEELINE_DATA_URL": archive.url})
    archive.content = good
    with pytest.raises(DownloadError, match="are not the known 397"):
        find_data(None, silent, cache=tmp_path, environ={"BEELINE_DATA_URL": archive.url})


def test_an_archive_with_a_digest_of_its_own_may_hold_other_pictures(archive: Any, tmp_path: Path) -> None:
    with pytest.raises(DownloadError) as caught:
        find_data(None, silent, cache=tmp_path, environ={"BEELINE_DATA_URL": archive.url})
    match = re.search(r"BEELINE_DATA_SHA256=(\w+)", str(caught.value))
    assert match
    environ = {"BEELINE_DATA_URL": archive.url, "BEELINE_DATA_SHA256": match[1]}
    assert len(find_data(None, silent, cache=tmp_path, environ=environ).train) == 16
    with pytest.raises(BeelineError, match="expected 000"):
        find_data(None, silent, cache=tmp_path, environ={**environ, "BEELINE_DATA_SHA256": "0" * 64})


@pytest.mark.shared
def test_the_pinned_digest_is_that_of_the_real_pictures(shared_data: Path) -> None:
    assert hymenoptera.digest(shared_data / "hymenoptera_data") == hymenoptera.PICTURES_SHA256
    found = read(shared_data / "hymenoptera_data")
    assert len(found.train) + len(found.val) == hymenoptera.PICTURES
    assert [path.name for path in found.train.skipped] == ["imageNotFound.gif"]
