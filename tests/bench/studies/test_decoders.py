"""Decoders beside each other: one that is there, one that is not, and a picture that only one of them scales."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.studies import decoders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A large JPEG, and a PNG that is left out: the binding reads none."""
    values = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    picture = Image.fromarray(values).resize((1200, 900))
    picture.save(tmp_path / "large.jpg")
    picture.save(tmp_path / "large.png")
    return tmp_path


def test_a_turn_tells_time_version_and_pixels(folder: Path) -> None:
    full, scaled = (decoders.turn(name, folder, 10) for name in ("pillow", "pillow, scaled"))
    assert full["milliseconds"] > 0
    assert full["version"].startswith("Pillow ")
    assert len(full["means"]) == 1
    difference = np.abs(np.array(full["means"]) - np.array(scaled["means"])).mean()
    assert 0 < difference < 3


def test_torchvision_sees_the_same_picture(folder: Path) -> None:
    ours, theirs = (decoders.turn(name, folder, 10) for name in ("pillow", "torchvision"))
    assert np.abs(np.array(ours["means"]) - np.array(theirs["means"])).mean() < 1


def test_what_is_not_installed_is_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    assert decoders.turn("libjpeg-turbo binding", folder, 10) == {"missing": "simplejpeg"}


def test_a_run_prints_and_keeps_a_row_for_each(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decoders.main(folder, None, 1, 10, folder / "out.json")
    kept = json.loads((folder / "out.json").read_text())
    named = [row["decoder"] for row in kept["rows"]]
    assert named[:2] == ["pillow", "pillow, scaled"]
    assert kept["rows"][0]["difference"] == 0
    assert "pillow, scaled" in capsys.readouterr().out
