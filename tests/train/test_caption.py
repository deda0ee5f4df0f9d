"""The small captioning model: its settings, its pictures, and its measure."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from beeline.errors import ArchiveError, ConfigError
from host import silent
from train import caption


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("stpes=3", "unknown key stpes of task=caption; did you mean 'steps'"),
        ("steps=0", "steps is 0"),
        ("rate=x", "rate is 'x'"),
        ("width=90", "width is 90: Input should be a multiple of 4"),
        ("side=8", "side is 8: Input should be greater than or equal to 16"),
        ("max_tokens=64", "max_tokens is 64: Input should be less than 64"),
        ("name=a b", "name is 'a b'"),
    ],
)
def test_a_wrong_setting_gets_a_sentence(word: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        caption.compose([word])


def test_without_transformers_nothing_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ArchiveError, match=r"task=caption needs transformers, which is not installed; install"):
        caption.fit(caption.compose([]), tmp_path, silent)


def test_held_out_pictures_are_not_those_to_train_on() -> None:
    config = caption.compose(["side=32"])
    (crops, words), (others, _) = (caption.drawn(config, part, 8) for part in ("train", "held out"))
    again, _ = caption.drawn(config, "train", 8)
    assert crops.shape == (8, 32, 32, 3)
    assert len(words) == 8
    assert np.array_equal(crops, again)
    assert not np.array_equal(crops, others)


def test_training_lowers_the_loss_and_whole_captions_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caption, "_EVERY", 20)
    config = replace(
        caption.compose(["side=32", "width=16", "encoder=1", "decoder=1", "pictures=64", "batch=16"]), steps=60
    )
    blank = caption._checkpoint(config, tmp_path)
    said: list[str] = []
    caption._train(blank, config, said.append)
    first, last = (float(line.partition("loss ")[2].split(",")[0]) for line in (said[0], said[-1]))
    assert last < first
    crops, words = caption.drawn(config, "train", 4)
    assert caption.exact(blank, crops, [""] * 4, 20) == 0.0
    # A fake that is always right: it writes the start, the words, the end and padding.
    rows = [[5, *blank.tokenizer(each).input_ids[1:], 0] for each in words]
    monkeypatch.setattr(blank.model, "generate", lambda part, **options: rows)
    assert caption.exact(blank, crops, words, 20) == 1.0
