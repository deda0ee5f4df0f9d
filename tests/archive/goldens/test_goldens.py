"""Golden pictures: made or given, with certain answers, and proved to notice each mistake."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from archive import goldens
from archive.export import export_folder
from archive.goldens.mistakes import MISTAKES
from beeline.engines.torch import TorchEngine
from beeline.errors import ArchiveError, SelfTestError
from beeline.golden import replay
from beeline.spec import ModelSpec
from tests.archive.conftest import LABELS, Changed, TinyNet, tiny_request

Crops = NDArray[np.uint8]


class Grey(TinyNet):
    """Sees no colour."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return super().forward(pictures.mean(1, keepdim=True).expand(-1, 3, -1, -1))


class Mean(Grey):
    """Sees no colour and no place."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return super().forward(pictures.mean((2, 3), keepdim=True).expand(-1, -1, 8, 8))


def opaque() -> TinyNet:
    """Return a network without gradients."""
    return Changed(torch.Tensor.detach)


def expected(export: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((export / "golden" / "expected.json").read_text())
    return values


def test_the_answers_are_certain_and_cover_the_first_and_the_last_label(tiny_export: Path) -> None:
    pictures = expected(tiny_export)["pictures"]
    assert all(picture["top"][0][1] >= goldens.FLOOR for picture in pictures)
    assert {LABELS[0], LABELS[-1]} <= {picture["top"][0][0] for picture in pictures}
    assert all(0 < sum(value for _, value in picture["top"]) <= 1 + 1e-5 for picture in pictures)
    assert expected(tiny_export)["detects"] == list(MISTAKES)


def test_every_step_of_preprocessing_matters_for_the_pictures(tiny_export: Path) -> None:
    orientations = []
    for path in sorted((tiny_export / "golden").glob("*.*g")):
        with Image.open(path) as image:
            assert image.width != image.height
            assert min(image.size) not in (32, 36)
            orientations.append(image.getexif().get(0x0112, 1))
    assert 6 in orientations


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(lambda crops: crops[..., ::-1], id="swapped channels"),
        pytest.param(
            lambda crops: (crops * np.array([0.229, 0.224, 0.225]) + 120).astype(np.uint8), id="normalised less"
        ),
        pytest.param(lambda crops: np.rot90(crops, axes=(1, 2)), id="turned"),
        pytest.param(lambda crops: np.roll(crops, 3, axis=1), id="cropped elsewhere"),
    ],
)
def test_each_mistake_before_the_model_fails_the_replay(tiny_export: Path, mistake: Callable[[Crops], Crops]) -> None:
    spec = ModelSpec.load(tiny_export)
    forward = TorchEngine(tiny_export, spec, device="cpu").forward
    assert replay(tiny_export, spec, forward) == 4
    with pytest.raises(SelfTestError):
        replay(tiny_export, spec, lambda crops: forward(np.ascontiguousarray(mistake(crops))))


def test_a_model_that_cannot_notice_a_mistake_is_refused_until_its_owner_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One attempt less than usual, because each takes seconds.
    monkeypatch.setattr(goldens, "_ATTEMPTS", 2)
    with pytest.raises(ArchiveError, match=r"would not notice red and blue swapped.*--blind-to channels"):
        export_folder(Grey(), tiny_request(), tmp_path / "export")
    export_folder(Grey(), tiny_request(blind_to=("channels",)), tmp_path / "export")
    assert set(expected(tmp_path / "export")["detects"]) - {"geometry"} == {"labels", "normalisation", "exif"}
    with pytest.raises(ArchiveError, match="'chanels'; did you mean 'channels'"):
        tiny_request(blind_to=("chanels",))


def test_all_missed_mistakes_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="--blind-to channels --blind-to exif"):
        export_folder(Mean(), tiny_request(), tmp_path / "export")


def test_without_made_pictures_the_message_asks_for_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fewer than usual, because no number of steps makes either network sure.
    monkeypatch.setattr(goldens, "_STEPS", 3)
    unsure = Changed(lambda scores: scores / 1000)
    for network, why in ((unsure, "is it trained"), (opaque(), "no gradient passes this model")):
        with pytest.raises(ArchiveError, match=f"{why}.*--golden DIR"):
            export_folder(network, tiny_request(), tmp_path / "export")


def test_given_pictures_keep_their_bytes_and_a_turned_one_is_added(tiny_export: Path, tmp_path: Path) -> None:
    own, written = tmp_path / "own", tmp_path / "export" / "golden"
    own.mkdir()
    for name in ("0.jpg", "1.png"):
        (own / name).write_bytes((tiny_export / "golden" / name).read_bytes())
    export_folder(opaque(), tiny_request(golden_pictures=own), tmp_path / "export")
    for name in ("0.jpg", "1.png"):
        assert (written / name).read_bytes() == (own / name).read_bytes()
    with Image.open(written / "2.jpg") as turned:
        assert turned.getexif()[0x0112] == 6


def test_given_pictures_of_two_sure_labels_are_refused_for_scores(tiny_export: Path, tmp_path: Path) -> None:
    # The second label has the score of the first.
    both = Changed(lambda rows: rows[:, [0, 0, 2]])
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "0.jpg").write_bytes((tiny_export / "golden" / "0.jpg").read_bytes())
    sure = r"'ants' 1\.00, 'bees' 1\.00"
    # All of them are named at once, by their files.
    with pytest.raises(ArchiveError, match=rf"pictures 0\.jpg \({sure}\), 0\.jpg, turned \({sure}\); take"):
        export_folder(both, tiny_request(output="scores", golden_pictures=tmp_path / "own"), tmp_path / "export")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "holds 0 files"),
        ({"a.jpg": b"no picture"}, r"a\.jpg cannot be used"),
        ({"a.png": None}, "take pictures of one label"),
    ],
)
def test_given_pictures_that_do_not_work_are_refused(
    tmp_path: Path, files: dict[str, bytes | None], reason: str
) -> None:
    own, grey = tmp_path / "own", io.BytesIO()
    own.mkdir()
    Image.new("RGB", (50, 40), (124, 116, 104)).save(grey, "PNG")
    for name, data in files.items():
        (own / name).write_bytes(grey.getvalue() if data is None else data)
    with pytest.raises(ArchiveError, match=reason):
        export_folder(TinyNet(), tiny_request(golden_pictures=own), tmp_path / "export")
