"""The generated picture set: the same everywhere, and learnable by shape alone."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.generate import LABELS, draw, generate


def test_the_same_seed_gives_the_same_pixels(tmp_path: Path, drawn: Path) -> None:
    again = generate(tmp_path, train=8, val=4)
    names = sorted(path.relative_to(drawn) for path in drawn.rglob("*.png"))
    assert len(names) == 2 * (8 + 4)
    for name in names:
        assert np.array_equal(np.asarray(Image.open(drawn / name)), np.asarray(Image.open(again / name)))


def test_another_seed_gives_other_pixels(tmp_path: Path, drawn: Path) -> None:
    other = generate(tmp_path, seed=1, train=1, val=1)
    name = "train/circles/000.png"
    assert (other / name).read_bytes() != (drawn / name).read_bytes()


def test_a_set_that_is_there_is_not_drawn_again(tmp_path: Path) -> None:
    folder = generate(tmp_path, train=1, val=1)
    mark = folder / "mark"
    mark.touch()
    assert generate(tmp_path, train=1, val=1) == folder
    assert mark.exists()


def test_a_drawing_cut_short_leaves_no_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(label: str, rng: random.Random) -> Image.Image:
        if label == LABELS[1]:
            raise KeyboardInterrupt
        return draw(label, rng)

    monkeypatch.setattr("train.generate.draw", stop)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path, train=1, val=1)
    assert list(tmp_path.iterdir()) == []


def test_training_and_validation_pictures_differ(drawn: Path) -> None:
    contents = [path.read_bytes() for path in drawn.rglob("*.png")]
    assert len(set(contents)) == len(contents)
