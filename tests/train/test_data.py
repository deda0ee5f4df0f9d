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


@pytest.mark.parametrize(("train", "val"), [("training", "validation"), ("train", "valid")])
def test_the_halves_have_other_names_and_an_outer_folder(folder: Path, train: str, val: str) -> None:
    (folder / "train").rename(folder / train)
    (folder / "val").rename(folder / val)
    found = read(folder.parent)
    assert (found.name, found.split) == ("set", f"the folders {train}/ and {val}/")


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


def test_a_file_that_is_no_photograph_by_name_is_left_out_and_named(folder: Path) -> None:
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
            r"a picture cannot be read: \S*/000\.png: the body starts with b'hello'",
        ),
        (["val", "train/circles/00[1-7].png"], {}, r"the class 'circles' has one picture only; training and valid"),
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
    assert labelled_pictures(folder).counts() == {"circles": 4, "stripes": 4}
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
