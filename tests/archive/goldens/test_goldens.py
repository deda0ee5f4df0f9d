"""Golden pictures: the project's own, sure, and proved to notice each mistake."""

from __future__ import annotations

import io
import json
from pathlib import Path

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
from beeline.golden import Forward, replay
from beeline.spec import ModelSpec
from tests.archive.conftest import LABELS, TinyNet, tiny_request

Crops = NDArray[np.uint8]


@pytest.fixture(scope="module")
def forward(tiny_export: Path) -> Forward:
    return TorchEngine(tiny_export, ModelSpec.load(tiny_export), device="cpu").forward


class Grey(TinyNet):
    """Sees no colour."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return super().forward(pictures.mean(1, keepdim=True).expand(-1, 3, -1, -1))


class Weak(TinyNet):
    """Leans to no class, whatever it is shown, as before training."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return super().forward(pictures) / 1000


class Rounded(TinyNet):
    """Lets no gradient through."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return super().forward(pictures.detach())


def test_the_answers_are_sure_and_cover_the_first_and_the_last_label(tiny_export: Path) -> None:
    pictures = json.loads((tiny_export / "golden" / "expected.json").read_text())["pictures"]
    assert all(picture["top"][0][1] >= goldens.FLOOR for picture in pictures)
    assert {LABELS[0], LABELS[-1]} <= {picture["top"][0][0] for picture in pictures}
    for picture in pictures:
        assert 0 < sum(value for _, value in picture["top"]) <= 1 + 1e-5


def test_the_pictures_make_every_step_matter(tiny_export: Path) -> None:
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
def test_each_mistake_before_the_model_fails_the_replay(tiny_export: Path, forward: Forward, mistake: object) -> None:
    spec = ModelSpec.load(tiny_export)
    assert replay(tiny_export, spec, forward) == 4
    with pytest.raises(SelfTestError):
        replay(tiny_export, spec, lambda crops: forward(np.ascontiguousarray(mistake(crops))))  # type: ignore[operator]


def test_missing_normalisation_and_shifted_labels_fail_the_replay(tiny_export: Path) -> None:
    spec = ModelSpec.load(tiny_export)
    bare = TinyNet().eval()

    def without(crops: Crops) -> NDArray[np.float32]:
        planes = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255
        return np.asarray(bare(planes).detach())

    with pytest.raises(SelfTestError):
        replay(tiny_export, spec, without)
    detects = json.loads((tiny_export / "golden" / "expected.json").read_text())["detects"]
    assert detects == list(MISTAKES)


def test_a_model_that_cannot_tell_a_mistake_is_refused_until_its_owner_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"would not notice red and blue swapped.*--blind-to channels"):
        export_folder(Grey(), tiny_request(), tmp_path / "export")
    export_folder(Grey(), tiny_request(blind_to=("channels",)), tmp_path / "export")
    detects = json.loads((tmp_path / "export" / "golden" / "expected.json").read_text())["detects"]
    assert "channels" not in detects
    assert {"labels", "normalisation", "exif"} <= set(detects)


@pytest.mark.parametrize(("network", "told"), [(Weak(), "is it trained"), (Rounded(), "no gradient passes this model")])
def test_a_model_for_which_no_picture_can_be_made_points_to_the_users_own(
    tmp_path: Path, network: torch.nn.Module, told: str
) -> None:
    with pytest.raises(ArchiveError, match=f"{told}.*--golden DIR"):
        export_folder(network, tiny_request(), tmp_path / "export")


def test_given_pictures_are_taken_as_they_are_and_one_is_turned(tiny_export: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for name in ("0.jpg", "1.png"):
        (own / name).write_bytes((tiny_export / "golden" / name).read_bytes())
    export_folder(Rounded(), tiny_request(golden_pictures=own), tmp_path / "export")
    written = tmp_path / "export" / "golden"
    assert (written / "0.jpg").read_bytes() == (own / "0.jpg").read_bytes()
    assert (written / "1.png").read_bytes() == (own / "1.png").read_bytes()
    with Image.open(written / "2.jpg") as turned:
        assert turned.getexif()[0x0112] == 6


@pytest.mark.parametrize(
    ("files", "told"),
    [({}, "holds 0 files"), ({"a.jpg": b"no picture"}, r"a\.jpg cannot be used"), ({"a.png": None}, "with only 0")],
)
def test_given_pictures_that_cannot_serve_are_refused(
    tmp_path: Path, files: dict[str, bytes | None], told: str
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    grey = io.BytesIO()
    Image.new("RGB", (50, 40), (124, 116, 104)).save(grey, "PNG")
    for name, data in files.items():
        (own / name).write_bytes(grey.getvalue() if data is None else data)
    with pytest.raises(ArchiveError, match=told):
        export_folder(TinyNet(), tiny_request(golden_pictures=own), tmp_path / "export")


def test_an_unknown_mistake_is_one_sentence() -> None:
    with pytest.raises(ArchiveError, match="'chanels'; did you mean 'channels'"):
        tiny_request(blind_to=("chanels",))
