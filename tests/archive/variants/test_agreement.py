"""The accuracy gate: pictures are not shared, agreement is measured, and a refusal says by how much."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from archive.variants import agreement
from archive.variants.agreement import Gate
from beeline.errors import ArchiveError, ConfigError
from beeline.spec import Agreement, Geometry

SMALL = Geometry(36, 32)


def draw(folder: Path, count: int, seed: int = 0) -> Path:
    """Write different pictures of noise."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = random.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((56, 40)).save(folder / f"{seed}-{number}.png")
    return folder


def test_one_folder_is_split_in_two_that_share_no_picture_whatever_their_names(tmp_path: Path) -> None:
    folder = draw(tmp_path / "a", 160)
    for path in list(folder.iterdir())[:20]:
        shutil.copyfile(path, folder / f"again-{path.name}")
    (folder / "notes.txt").write_text("no picture")
    read = agreement.read(folder, None, SMALL)
    assert len(read.judged) + len(read.calibration) == 160
    assert not {crop.tobytes() for crop in read.judged} & {crop.tobytes() for crop in read.calibration}
    assert read.source == "a"
    for number, path in enumerate(sorted(folder.iterdir(), reverse=True)):
        path.rename(folder / f"renamed-{number}.png")
    assert np.array_equal(agreement.read(folder, None, SMALL).judged, read.judged)


def test_a_picture_in_both_folders_only_judges(tmp_path: Path) -> None:
    judged, calibration = draw(tmp_path / "val", 60, 1), draw(tmp_path / "train", 80, 2)
    for path in judged.iterdir():
        shutil.copyfile(path, calibration / f"leaked-{path.name}")
    read = agreement.read(judged, calibration, SMALL)
    assert (len(read.judged), len(read.calibration)) == (60, 80)
    # All pictures judge if nothing is calibrated.
    read = agreement.read(judged, None, SMALL, calibrates=False)
    assert (len(read.judged), len(read.calibration)) == (60, 0)


def test_too_few_pictures_are_refused(tmp_path: Path) -> None:
    few, many = draw(tmp_path / "few", 20), draw(tmp_path / "many", 160)
    with pytest.raises(ArchiveError, match=r"there are 20 pictures to judge by in .*; at least 50 are needed: name a"):
        agreement.read(few, None, SMALL, calibrates=False)
    with pytest.raises(ArchiveError, match=r"to judge by and \d+ to calibrate with in .*at least 50 of each .*--pictu"):
        agreement.read(few, None, SMALL)
    # Scaled decoding does not change small pictures.
    with pytest.raises(
        ArchiveError, match=r"0 pictures to judge by that scaled decoding .* least twice 36 pixels with"
    ):
        agreement.read(many, None, Geometry(36, 32, decoding="scaled"))
    with pytest.raises(ArchiveError, match="is missing"):
        agreement.read(tmp_path / "nowhere", None, SMALL)


def test_decoding_on_a_device_needs_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="there is no CUDA device to judge it by"):
        agreement.read(draw(tmp_path / "some", 160), None, Geometry(36, 32, decoding="cuda"))


def test_agreement_and_movement_are_measured() -> None:
    reference = np.tile([0.6, 0.4], (200, 1))
    variant = reference.copy()
    variant[:3] = [0.4, 0.6], [0.55, 0.45], [0.57, 0.43]
    assert agreement.measure(reference, variant, "here") == Agreement(0.995, 0.2, 0.03, 200, "here")
    # Numbers that are not finite agree with nothing.
    assert agreement.measure(reference, variant * np.nan, "here") == Agreement(0.0, 1.0, 1.0, 200, "here")


def test_of_scores_any_label_that_holds_may_be_first() -> None:
    reference = np.tile([0.97, 0.96, 0.4], (3, 1))
    variant = np.array([[0.96, 0.97, 0.4], [0.3, 0.3, 0.4], [0.97, 0.96, 0.4]])
    assert agreement.same_first(reference, variant, "scores").tolist() == [True, False, True]
    assert agreement.measure(reference, variant, "here", "scores").top1 == pytest.approx(2 / 3, abs=1e-5)
    assert agreement.measure(reference, variant, "here", "logits").top1 == pytest.approx(1 / 3, abs=1e-5)


@pytest.mark.parametrize(
    ("measured", "reason"),
    [
        (
            Agreement(0.955, 0.1, 0.05, 200, "val"),
            r"95\.5% .* 3\.5% fewer than the required 99\.0% .*200 pictures of val",
        ),
        (Agreement(1.0, 0.6, 0.25, 200, "val"), r"moves by 0\.250 or more, 0\.100 are allowed"),
        (Agreement(0.99, 0.4, 0.1, 200, "val"), None),
    ],
)
def test_the_gate_refuses_a_variant_and_says_by_how_much(measured: Agreement, reason: str | None) -> None:
    if reason is None:
        agreement.check(measured, Gate(), "openvino int8")
    else:
        with pytest.raises(ArchiveError, match=reason):
            agreement.check(measured, Gate(), "openvino int8")


@pytest.mark.parametrize("numbers", [(99, 0.1), (0, 0.1), (float("nan"), 0.1), (0.99, float("nan")), (0.99, -0.1)])
def test_a_limit_that_lets_everything_or_nothing_pass_is_refused(numbers: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="allowed"):
        Gate(*numbers)
