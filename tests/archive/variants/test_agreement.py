"""The accuracy gate: disjoint pictures, agreement and movement measured, a refusal that says by how much."""

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
    """Write pictures of noise, each another one."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = random.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((56, 40)).save(folder / f"{seed}-{number}.png")
    return folder


def test_one_folder_is_split_in_two_that_share_no_picture(tmp_path: Path) -> None:
    folder = draw(tmp_path / "a", 160)
    for path in list(folder.iterdir())[:20]:
        shutil.copyfile(path, folder / f"again-{path.name}")
    (folder / "notes.txt").write_text("no picture")
    read = agreement.read(folder, None, SMALL)
    assert len(read.judged) + len(read.calibration) == 160
    both = {crop.tobytes() for crop in read.judged} & {crop.tobytes() for crop in read.calibration}
    assert both == set()
    assert read.source == "a"


def test_what_is_in_both_folders_is_only_judged_by(tmp_path: Path) -> None:
    judged, calibration = draw(tmp_path / "val", 60, 1), draw(tmp_path / "train", 80, 2)
    for path in judged.iterdir():
        shutil.copyfile(path, calibration / f"leaked-{path.name}")
    read = agreement.read(judged, calibration, SMALL)
    assert (len(read.judged), len(read.calibration)) == (60, 80)


def test_the_order_of_files_changes_nothing(tmp_path: Path) -> None:
    folder = draw(tmp_path / "a", 130)
    first = agreement.read(folder, None, SMALL)
    for number, path in enumerate(sorted(folder.iterdir(), reverse=True)):
        path.rename(folder / f"renamed-{number}.png")
    assert np.array_equal(agreement.read(folder, None, SMALL).judged, first.judged)


def test_where_nothing_is_calibrated_all_pictures_judge(tmp_path: Path) -> None:
    read = agreement.read(draw(tmp_path / "a", 60), None, SMALL, calibrates=False)
    assert (len(read.judged), len(read.calibration)) == (60, 0)
    with pytest.raises(ArchiveError, match=r"there are 20 pictures to judge by in .*at least 50 are needed"):
        agreement.read(draw(tmp_path / "b", 20), None, SMALL, calibrates=False)


def test_too_few_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"at least 50 of each .*--pictures"):
        agreement.read(draw(tmp_path / "a", 20), None, SMALL)
    with pytest.raises(ArchiveError, match="is missing"):
        agreement.read(tmp_path / "nowhere", None, SMALL)


def test_agreement_and_movement() -> None:
    reference = np.tile([0.6, 0.4], (200, 1))
    found = reference.copy()
    found[0] = [0.4, 0.6]
    found[1] = [0.55, 0.45]
    found[2] = [0.57, 0.43]
    assert agreement.measure(reference, found, "here") == Agreement(0.995, 0.2, 0.03, 200, "here")


def test_what_is_not_finite_agrees_on_nothing() -> None:
    reference = np.tile([0.6, 0.4], (100, 1))
    measured = agreement.measure(reference, np.full((100, 2), np.nan), "here")
    assert (measured.top1, measured.moved_99) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (Agreement(0.955, 0.1, 0.05, 200, "val"), r"95\.5% .* 3\.5% fewer than the 99\.0% .*200 pictures of val"),
        (Agreement(1.0, 0.6, 0.25, 200, "val"), r"moves by 0\.250 or more, 0\.100 are allowed"),
    ],
)
def test_a_refusal_says_by_how_much(found: Agreement, said: str) -> None:
    with pytest.raises(ArchiveError, match=said):
        agreement.check(found, Gate(), "openvino int8")


def test_what_is_near_enough_passes() -> None:
    agreement.check(Agreement(0.99, 0.4, 0.1, 200, "val"), Gate(), "openvino int8")


@pytest.mark.parametrize("numbers", [(99, 0.1), (0, 0.1), (float("nan"), 0.1), (0.99, float("nan")), (0.99, -0.1)])
def test_a_limit_that_would_let_everything_or_nothing_pass_is_refused(numbers: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="allowed"):
        Gate(*numbers)


def test_pictures_that_scaled_decoding_does_not_touch_judge_nothing_of_it(tmp_path: Path) -> None:
    folder = draw(tmp_path / "small", 160)
    with pytest.raises(ArchiveError, match=r"0 are JPEGs of at least twice 36 pixels"):
        agreement.read(folder, None, Geometry(36, 32, decoding="scaled"))


def test_decoding_on_a_device_is_judged_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, geometry = draw(tmp_path / "some", 160), Geometry(36, 32, decoding="cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device is there to judge it by"):
        agreement.read(folder, None, geometry)
