"""`beeline data add`: what people told comes into the training half, once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from beeline.errors import BeelineError
from cli.main import app
from tests.conftest import BLUE, GREEN, RED, picture
from train.data import read

OTHER = picture((1, 2, 3), kind="JPEG")


def put(folder: Path, *pictures: bytes) -> None:
    folder.mkdir(parents=True)
    for number, data in enumerate(pictures):
        (folder / str(number)).write_bytes(data)


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("train.index.FOLDER", tmp_path / "index")
    for half, pictures in {"train": (RED, GREEN), "val": (BLUE, picture((90, 90, 90)))}.items():
        for label, data in zip(("cold", "warm"), pictures, strict=True):
            put(tmp_path / "set" / half / label, data)
    return tmp_path / "set"


def add(*folders: Path) -> dict[str, object]:
    done = CliRunner().invoke(app, ["data", "add", *map(str, folders), "--json"], catch_exceptions=False)
    return {**json.loads(done.stdout), "said": re.sub(r"\s+", " ", done.stderr)}


def test_pictures_come_into_the_training_half_once_and_neither_halves_own(dataset: Path, tmp_path: Path) -> None:
    told, before = tmp_path / "told" / "model", read(dataset)
    put(told / "cold", OTHER, BLUE, GREEN, OTHER[:200])
    put(told / "warm", OTHER)
    put(told / "a new one", picture((7, 8, 9)))
    values = add(tmp_path / "told", dataset)
    assert values["added"] == {"cold": 1}
    assert values["left_out"] == {"already there": 3, "damaged": 1, "of a new label": 1}
    for sentence in ("'a new one' is a new label", "warm/0 was told to be 'cold'", ".jpeg was told to be 'warm'"):
        assert sentence in str(values["said"])
    after = read(dataset)
    assert (after.train.counts(), after.val.digest) == ({"cold": 2, "warm": 1}, before.val.digest)
    assert next((dataset / "train" / "cold").glob("feedback-*.jpeg")).read_bytes() == OTHER
    assert add(told, dataset)["added"] == {}


def test_a_set_without_halves_is_refused_since_it_is_split_by_name(dataset: Path) -> None:
    for label in ("cold", "warm"):
        (dataset / "train" / label / "1").write_bytes(OTHER)
    with pytest.raises(BeelineError, match=r"train has no two halves, so an added picture could be held out; name"):
        add(dataset / "val", dataset / "train")
