"""A finished run's validation pictures: found where they are the same, and nowhere else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from train import data as room
from train.config import compose
from train.errors import DataError
from train.runs import Run, create, finish, validation_pictures


def make(tmp_path: Path, folder: Path | None, data: room.DataSet, generated: bool = False) -> Run:
    """Return a run on these pictures without the training."""
    run = create("net", "abcdef", tmp_path / "runs")
    compose([f"data.folder='{folder}'"] if folder else [], environ={}).save(run / "config.yaml")
    recorded = {"name": data.name, "generated": generated, "digest": data.digest}
    return finish(run, {"fingerprint": "abcdef", "labels": list(data.labels), "accuracy": 0.5, "data": recorded})


def test_they_are_found_where_the_run_found_them(drawn: Path, tmp_path: Path) -> None:
    data = room.read(drawn)
    found = validation_pictures(make(tmp_path, drawn, data), tmp_path / "cache", {})
    assert found.pictures == data.val.pictures
    assert found.counts() == {"circles": 4, "stripes": 4}


def test_a_held_out_share_is_the_same_share(drawn: Path, tmp_path: Path) -> None:
    data = room.read(drawn / "train", 0.2)
    found = validation_pictures(make(tmp_path, drawn / "train", data), tmp_path / "cache", {})
    assert found.pictures == data.val.pictures


@pytest.mark.parametrize("generated", [True, False])
def test_downloaded_and_generated_ones_are_found_in_the_cache(drawn: Path, tmp_path: Path, generated: bool) -> None:
    data = room.read(drawn, name="set")
    cache = tmp_path / "cache"
    (cache / "set-0").mkdir(parents=True)
    shutil.copytree(drawn, cache / ("generated-1" if generated else "set-1"))
    found = validation_pictures(make(tmp_path, None, data, generated), cache, {})
    assert found.root.is_relative_to(cache)
    assert len(found) == 8


def test_moved_ones_are_found_by_the_environment(drawn: Path, tmp_path: Path) -> None:
    run = make(tmp_path, tmp_path / "gone", room.read(drawn))
    assert len(validation_pictures(run, tmp_path / "cache", {"BEELINE_DATA": str(drawn)})) == 8


def test_changed_ones_are_not_taken(drawn: Path, tmp_path: Path) -> None:
    here = shutil.copytree(drawn, tmp_path / "here")
    run = make(tmp_path, here, room.read(here))
    changed = here / "val" / "circles" / "000.png"
    shutil.copyfile(here / "val" / "stripes" / "000.png", changed)
    with pytest.raises(DataError, match=rf"are no longer as they were in {here}; bring them back"):
        validation_pictures(run, tmp_path / "cache", {})
    shutil.rmtree(here)
    with pytest.raises(DataError, match="are no longer as they were"):
        validation_pictures(run, tmp_path / "cache", {})
