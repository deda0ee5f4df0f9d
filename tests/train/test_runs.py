"""Runs on disk: found by fingerprint, only when they were finished, and their validation pictures where they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from train import runs
from train.config import compose
from train.data import DataSet, read
from train.errors import DataError, RunError
from train.runs import Run, create, find_run, finish, finished, open_run, validation_pictures

RECORD = {"fingerprint": "abcdef0123", "labels": ["a", "b"], "accuracy": 0.5}


def make(folder: Path, **changes: object) -> Run:
    made = create("net", "abcdef0123", folder)
    (made / "checkpoint.pth").touch()
    return finish(made, {**RECORD, **changes})


def test_a_finished_run_is_found_by_fingerprint_and_id_as_long_as_it_has_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path)
    assert find_run("abcdef0123", tmp_path) == run.folder
    assert find_run("other", tmp_path) is None
    assert open_run(run.folder).labels == ("a", "b")
    monkeypatch.setattr(runs, "RUNS", tmp_path)
    assert open_run(Path(run.id)).folder == run.folder
    run.checkpoint.unlink()
    assert find_run("abcdef0123", tmp_path) is None


def test_the_newest_of_several_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []
    for stamp in ("20250101-000000", "20260101-000000", "20240101-000000"):
        monkeypatch.setattr("train.runs.time.strftime", lambda _, stamp=stamp: stamp)
        folders.append(make(tmp_path).folder)
    assert find_run("abcdef0123", tmp_path) == folders[1]
    assert [run.folder for run in finished(tmp_path)] == sorted(folders, reverse=True)
    # Of the same second.
    assert make(tmp_path).id == f"{folders[2].name}-2"


@pytest.mark.parametrize("content", [None, "", "{", '{"schema": 1}', '{"schema": 2}', "[]", "null"])
def test_an_unfinished_or_damaged_run_is_never_taken(tmp_path: Path, content: str | None) -> None:
    run = make(tmp_path)
    record = run.folder / "run.json"
    record.unlink()
    if content is not None:
        record.write_text(content)
    assert find_run("abcdef0123", tmp_path) is None
    assert list(finished(tmp_path)) == []
    with pytest.raises(RunError, match=r"was not finished|run\.json is damaged \(.*\); train again"):
        open_run(run.folder)


def test_a_missing_run_has_its_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"the run \S*/gone is missing; train again, or name another of"):
        open_run(tmp_path / "gone")


def test_the_record_is_whole_or_not_there_and_survives_a_move(tiny_run: Run, tmp_path: Path) -> None:
    folder = create("net", "abcdef0123", tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        finish(folder, {**RECORD, "accuracy": float("nan")})
    assert not (folder / "run.json").exists()
    moved = shutil.move(shutil.copytree(tiny_run.folder, tmp_path / "a"), tmp_path / "b")
    assert open_run(Path(moved)).record == json.loads((tiny_run.folder / "run.json").read_text())


def trained_on(tmp_path: Path, folder: Path | None, data: DataSet, generated: bool = False) -> Run:
    """Return a run on these pictures without the training."""
    recorded = {"name": data.name, "generated": generated, "digest": data.digest}
    run = make(tmp_path / "runs", data=recorded)
    compose([f"data.folder='{folder}'"] if folder else [], environ={}).save(run.folder / "config.yaml")
    return run


def test_a_folder_of_runs_that_is_a_dangling_link_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to(tmp_path / "not mounted")
    with pytest.raises(FileExistsError, match="runs"):
        create("resnet18", "abcdef", tmp_path / "runs")


@pytest.mark.parametrize("half", ["", "train"])
def test_validation_pictures_are_found_where_the_run_found_them(drawn: Path, tmp_path: Path, half: str) -> None:
    """Of a single image folder they are the same held-out share."""
    data = read(drawn / half)
    run = trained_on(tmp_path, drawn / half, data)
    assert validation_pictures(run, tmp_path / "cache", {}).pictures == data.val.pictures
    moved = trained_on(tmp_path, tmp_path / "gone", data)
    found = validation_pictures(moved, tmp_path / "cache", {"BEELINE_DATA": str(drawn / half)})
    assert found.pictures == data.val.pictures


@pytest.mark.parametrize("generated", [True, False])
def test_downloaded_and_generated_pictures_are_found_in_the_cache(drawn: Path, tmp_path: Path, generated: bool) -> None:
    cache = tmp_path / "cache"
    (cache / "set-0").mkdir(parents=True)
    shutil.copytree(drawn, cache / ("generated-1" if generated else "set-1"))
    found = validation_pictures(trained_on(tmp_path, None, read(drawn, name="set"), generated), cache, {})
    assert found.root.is_relative_to(cache)
    assert len(found) == 8


def test_changed_or_lost_pictures_are_not_taken(drawn: Path, tmp_path: Path) -> None:
    here = shutil.copytree(drawn, tmp_path / "here")
    run = trained_on(tmp_path, here, read(here))
    shutil.copyfile(here / "val/stripes/000.png", here / "val/circles/000.png")
    with pytest.raises(DataError, match=rf"are no longer as they were in {here}; bring them back"):
        validation_pictures(run, tmp_path / "cache", {})
    shutil.rmtree(here)
    with pytest.raises(DataError, match="are no longer as they were"):
        validation_pictures(run, tmp_path / "cache", {})


def test_latest_is_the_newest_finished_run_and_never_an_interrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "RUNS", tmp_path)
    with pytest.raises(RunError, match=r"there is no finished run in \S*, so none is the latest; train one with"):
        open_run(Path("latest"))
    folders = []
    for stamp, is_finished in (("20250101-000000", True), ("20260101-000000", True), ("20270101-000000", False)):
        monkeypatch.setattr("train.runs.time.strftime", lambda _, stamp=stamp: stamp)
        folders.append(make(tmp_path).folder if is_finished else create("net", "abcdef0123", tmp_path))
    assert open_run(Path("latest")).folder == folders[1]
    # A folder of that name is meant where there is one.
    (tmp_path / "here/latest").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert runs.find_folder(Path("latest")) == Path("latest")


def test_a_run_knows_by_content_what_it_was_trained_on(tiny_run: Run, drawn: Path) -> None:
    data = read(drawn)
    assert tiny_run.seen == {picture.sha256 for picture in data.train.pictures}
    assert len(tiny_run.seen) == 16
    lines = (tiny_run.folder / "pictures.csv").read_text().splitlines()
    assert lines[0] == "split,label,path,sha256"
    assert sum(line.startswith("val,") for line in lines) == 8


def test_a_run_from_before_there_was_a_list_knows_nothing(tmp_path: Path) -> None:
    assert make(tmp_path).seen is None
