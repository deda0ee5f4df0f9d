"""Picture folders: found in order, read, split, drawn, and refused with a sentence."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from host import silent
from train import data, download
from train.data import find_data, labelled_pictures, read
from train.errors import DataError
from train.generate import LABELS, draw, generate


@pytest.fixture
def folder(tmp_path: Path, drawn: Path) -> Path:
    return Path(shutil.copytree(drawn, tmp_path / "set"))


def test_two_halves_are_read_with_sorted_labels(folder: Path) -> None:
    found = read(folder)
    assert found.labels == ("circles", "stripes")
    assert found.train.counts() == {"circles": 8, "stripes": 8}
    assert found.val.counts() == {"circles": 4, "stripes": 4}
    assert (found.name, found.generated) == ("set", False)
    assert all(picture.path.parent.name == found.labels[picture.truth] for picture in found.train.pictures)


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("training", "validation"),
        ("train", "valid"),
        ("Train", "Val"),
        ("TRAIN", "Test"),
        ("training_set", "test_set"),
        ("trainset", "testset"),
        ("train", "testing"),
        ("Training Images", "Validation Images"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("images/train", "images/val"),
    ],
)
def test_the_halves_have_other_names_and_outer_folders(folder: Path, train: str, val: str) -> None:
    for old, new in (("train", train), ("val", val)):
        (folder / old).rename(folder / "moved")
        (folder / new).parent.mkdir(parents=True, exist_ok=True)
        (folder / "moved").rename(folder / new)
    found = read(folder.parent)
    names = [Path(each).name for each in (train, val)]
    assert (found.name, found.split) == (
        "images" if "images/" in train else "set",
        f"the folders {names[0]}/ and {names[1]}/",
    )
    assert found.labels == ("circles", "stripes")
    assert (len(found.train), len(found.val)) == (16, 8)
    assert len(labelled_pictures(folder.parent)) == 8


def test_a_test_half_is_said_whether_it_is_used_or_not(folder: Path) -> None:
    shutil.copytree(folder / "val", folder / "Test")
    (folder / "notes").mkdir()
    said: list[str] = []
    find_data(folder, said.append, environ={})
    assert "data: Test/ is not used in training: measure on it with `beeline evaluate RUN --data`" in said
    assert "data: notes/ is neither half and not used" in said
    shutil.rmtree(folder / "val")
    find_data(folder, said.append, environ={})
    assert "data: there is no val/, so Test/ is the validation half" in said


@pytest.mark.parametrize(
    ("moves", "sentence"),
    [
        ({"val": "holdback"}, r"has train/ and holdback/ with the same classes; call one val"),
        ({"train": "Val_set"}, r"has both Val_set/ and val/; move one"),
        ({"train/circles": "a/train/x", "train/stripes": "b/train/x"}, "has val/ but no train/"),
        (
            {"train/circles": "a/train/x", "train/stripes": "b/train/x", "val": "../val"},
            r"/set has halves in each of \S*/a, \S*/b; put all classes into one train/",
        ),
        (
            {"train/circles": "T", "val/circles": "V", "train": "../x", "val": "../y", "T": "Train", "V": "Val"},
            r"/set has Train and Val, which hold no class folders; give them one a class",
        ),
    ],
)
def test_halves_that_do_not_fit_together_are_refused_and_never_become_classes(
    folder: Path, moves: dict[str, str], sentence: str
) -> None:
    for old, new in moves.items():
        (folder / new).parent.mkdir(parents=True, exist_ok=True)
        (folder / old).rename(folder / new)
    with pytest.raises(DataError, match=sentence):
        read(folder)


def test_a_class_may_be_called_train(folder: Path) -> None:
    """A folder of pictures alone is a class; only one that holds class folders is a half."""
    (folder / "train/circles").rename(folder / "train/train")
    (folder / "val/circles").rename(folder / "val/train")
    assert read(folder).labels == read(folder / "train").labels == ("stripes", "train")


def test_hidden_copies_and_thumbnails_are_left_out(folder: Path) -> None:
    good = (folder / "train/circles/000.png").read_bytes()
    for name in (".ipynb_checkpoints/000.png", "@eaDir/000.png", "__MACOSX/._000.png", "._000.png", "Thumbs.db"):
        for place in ("train/circles", "val", "."):
            (folder / place / name).parent.mkdir(exist_ok=True)
            (folder / place / name).write_bytes(good)
    said: list[str] = []
    found = find_data(folder, said.append, environ={})
    assert (found.labels, len(found.train), len(found.val)) == (("circles", "stripes"), 16, 8)
    assert said[-1].startswith("data: 10 files are hidden or no photographs and left out: ")


def test_a_picture_is_known_by_its_content_whatever_its_name(folder: Path) -> None:
    circles, drawn = folder / "train/circles", folder / "train/circles/000.png"
    drawn.rename(circles / "nameless")
    (circles / "001.png").rename(circles / "001.jfif")
    (circles / "002.png").rename(circles / "002.txt")
    Image.new("RGB", (40, 40)).save(circles / "sign.png", "GIF")
    (circles / "BMW.txt").write_text("BMW, a text that begins as a BMP does")
    found = read(folder)
    assert found.train.counts()["circles"] == 8
    assert sorted(path.name for path in found.train.skipped) == ["BMW.txt", "sign.png"]


def test_links_are_followed_though_not_in_a_circle_and_broken_ones_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "train/circles").rename(tmp_path / "elsewhere")
    (folder / "train/circles").symlink_to(tmp_path / "elsewhere")
    (folder / "train/stripes/again").symlink_to(folder / "train")
    (folder / "train/stripes/own").symlink_to(tmp_path / "elsewhere/000.png")
    found = read(folder)
    assert found.train.counts() == {"circles": 8, "stripes": 9 + 8}
    (folder / "train/stripes/again").unlink()
    (folder / "train/stripes/gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "train/waves").symlink_to(tmp_path / "nowhere")
    said: list[str] = []
    with pytest.raises(DataError, match=r"2 pictures cannot be read, such as \S*/waves: it leads to no folder; repair"):
        read(folder, say=said.append)
    assert said[1].endswith("train/stripes/gone.png: it leads to no file")


def test_all_damaged_pictures_are_one_list_and_the_rest_is_taken_only_on_request(folder: Path) -> None:
    good = (folder / "train/circles/000.png").read_bytes()
    damage = {
        "train/circles/cut.png": good[: len(good) // 2],
        "train/stripes/empty.jpg": b"",
        "train/stripes/page.jpg": b"<html>",
        "val/circles/header.png": good[:20],
        "val/stripes/cut": good[:-200],
    }
    for name, content in damage.items():
        (folder / name).write_bytes(content)
    said: list[str] = []
    with pytest.raises(
        DataError, match=r"^5 pictures cannot be read, such as .*; repair or remove them, or leave them "
    ):
        find_data(folder, said.append, environ={})
    assert [line.split(": ")[2].removeprefix(f"{folder}/") for line in said] == list(damage)
    found = find_data(folder, said.append, environ={}, damaged="leave_out")
    assert (len(found.train), len(found.val)) == (16, 8)
    assert "data: 5 pictures that cannot be read left out, as asked for" in said
    for path in (folder / "val/stripes").glob("*.png"):
        path.write_bytes(good[:50])
    with pytest.raises(DataError, match=r"the class folder \S*/val/stripes has no pictures"):
        read(folder, damaged="leave_out")


def test_the_same_picture_in_both_halves_is_counted(folder: Path) -> None:
    shutil.copy(folder / "train/circles/003.png", folder / "val/stripes/other-name.png")
    said: list[str] = []
    find_data(folder, said.append, environ={})
    assert said[-1].startswith("data: 1 of 9 validation pictures are training pictures too, byte for byte, so the ")
    assert said[-1].endswith(f"one is {folder}/val/stripes/other-name.png, as {folder}/train/circles/003.png")


@pytest.mark.parametrize("below", ["train", ""])
def test_a_single_image_folder_is_split_alike_wherever_it_lies(folder: Path, tmp_path: Path, below: str) -> None:
    shutil.rmtree(folder / "val")
    first = read(folder / below, 0.25)
    second = read(Path(shutil.copytree(folder / "train", tmp_path / "elsewhere")), 0.25)
    assert first.val.counts() == {"circles": 2, "stripes": 2}
    assert first.train.counts() == {"circles": 6, "stripes": 6}
    assert {p.path for p in first.train.pictures}.isdisjoint(p.path for p in first.val.pictures)
    assert [p.path.name for p in first.val.pictures] == [p.path.name for p in second.val.pictures]
    assert first.split == "25% of each class held out"


def test_a_file_that_is_hidden_or_no_photograph_is_left_out_and_named(folder: Path) -> None:
    for name in ("train/circles/sign.gif", "train/circles/notes.txt", "val/stripes/.DS_Store", "train/list.csv"):
        (folder / name).write_bytes(b"GIF89a")
    said: list[str] = []
    found = find_data(folder, said.append, environ={})
    assert len(found.train) == 16
    assert said[-1].startswith("data: 4 files are hidden or no photographs and left out: ")
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


@pytest.mark.parametrize(
    ("removed", "written", "sentence"),
    [
        (["."], {}, r"the data folder \S*/set is missing; name a folder"),
        (["."], {"": "x"}, r"the data folder \S*/set is a file, not a folder; name a folder"),
        (["train/circles/*"], {}, r"the class folder \S*/train/circles has no pictures \(\.jpg.*\); add some"),
        (["train/circles"], {}, r"\S*/train has only the class folder 'stripes'; a classifier needs"),
        (["train", "val"], {"0.png": "x"}, r"\S*/set has no class folders; a classifier needs"),
        (["train"], {}, r"has val/ but no train/; add it"),
        (
            [],
            {"val/circles/000.png": "hello"},
            r"1 picture cannot be read, such as \S*/000\.png: the body starts with b'hello'",
        ),
        (
            ["train/*/*", "val/circles/*"],
            {},
            r"the class folders \S*/train/circles, \S*/stripes, \S*/val/circles have no",
        ),
        (["val", "train/circles/00[1-7].png"], {}, r"the class 'circles' has one picture only; training and valid"),
        (["val", "train/*/00[1-7].png"], {}, r"the classes circles, stripes have one picture only; training and valid"),
    ],
)
def test_every_bad_folder_has_its_sentence(
    folder: Path, removed: list[str], written: dict[str, str], sentence: str
) -> None:
    for path in [path for name in removed for path in ([folder] if name == "." else sorted(folder.glob(name)))]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, text in written.items():
        (folder / name).write_text(text)
    with pytest.raises(DataError, match=sentence) as caught:
        read(folder)
    assert "\n" not in str(caught.value)


def test_a_class_in_one_half_only_is_named(folder: Path) -> None:
    shutil.copytree(folder / "train/circles", folder / "train/squares")
    with pytest.raises(DataError, match="has the class 'squares' in only one of train/ and val/; give both"):
        read(folder)


def test_evaluation_takes_the_validation_half_broken_pictures_included(folder: Path) -> None:
    (folder / "val/circles/000.png").write_text("hello")
    (folder / "val/circles/notes.txt").write_text("hello")
    (folder / "val/waves").symlink_to(folder / "nowhere")
    said: list[str] = []
    assert labelled_pictures(folder, said.append).counts() == {"circles": 4, "stripes": 4}
    assert said == [
        f"data: 1 file is hidden or no photographs and left out: {folder}/val/circles/notes.txt",
        f"data: {folder}/val/waves: it leads to no folder",
    ]
    assert labelled_pictures(folder / "train").counts() == {"circles": 8, "stripes": 8}


def test_the_option_beats_the_environment(folder: Path, tmp_path: Path) -> None:
    environ = {"BEELINE_DATA": str(tmp_path / "missing")}
    assert find_data(folder, silent, cache=tmp_path, environ=environ).name == "set"
    with pytest.raises(DataError, match="missing"):
        find_data(None, silent, cache=tmp_path, environ=environ)


@pytest.mark.parametrize("asked", [True, False])
def test_pictures_are_drawn_on_request_or_without_a_network_and_it_is_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    monkeypatch.setattr(data, "generate", lambda cache: generate(cache, train=2, val=1))
    environ = {"BEELINE_DATA_URL": "http://127.0.0.1:1/set.zip"}
    if asked:
        monkeypatch.setattr(data, "hymenoptera", lambda *_: pytest.fail("pictures were looked for"))
        environ = {"BEELINE_DATA": str(folder)}
    said: list[str] = []
    found = find_data(None, said.append, cache=tmp_path, environ=environ, generated=asked)
    assert (found.generated, found.labels, len(found.train)) == (True, LABELS, 4)
    assert any("GENERATED pictures" in line and "no photographs" in line for line in said)
    assert any(("as asked for" if asked else "cannot be reached") in line for line in said)


def test_the_same_seed_draws_the_same_pixels_and_no_two_pictures_are_alike(tmp_path: Path, drawn: Path) -> None:
    again, other = generate(tmp_path, train=8, val=4), generate(tmp_path, seed=1, train=1, val=1)
    names = sorted(path.relative_to(drawn) for path in drawn.rglob("*.png"))
    assert len(names) == 2 * (8 + 4)
    for name in names:
        assert np.array_equal(np.asarray(Image.open(drawn / name)), np.asarray(Image.open(again / name)))
    contents = [path.read_bytes() for root in (drawn, other) for path in root.rglob("*.png")]
    assert len(set(contents)) == len(contents) == 28


def test_a_set_is_drawn_once_and_an_interrupted_one_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(label: str, rng: random.Random) -> Image.Image:
        if label == LABELS[1]:
            raise KeyboardInterrupt
        return draw(label, rng)

    with monkeypatch.context() as patch:
        patch.setattr("train.generate.draw", stop)
        with pytest.raises(KeyboardInterrupt):
            generate(tmp_path, train=1, val=1)
    assert list(tmp_path.iterdir()) == []
    folder = generate(tmp_path, train=1, val=1)
    (folder / "mark").touch()
    assert (generate(tmp_path, train=1, val=1) / "mark").exists()


@pytest.mark.shared
def test_the_pinned_digest_is_that_of_the_real_pictures(shared_data: Path) -> None:
    assert download.digest(shared_data / "hymenoptera_data") == download.PICTURES_SHA256
    found = read(shared_data / "hymenoptera_data")
    assert len(found.train) + len(found.val) == download.PICTURES
    assert [path.name for path in found.train.skipped] == ["imageNotFound.gif"]
