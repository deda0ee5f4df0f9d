"""Runs on disk: found by fingerprint, and only when they were finished."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from train import runs
from train.errors import RunError
from train.runs import Run, create, find_run, finish, finished, open_run

RECORD = {"fingerprint": "abcdef0123", "labels": ["a", "b"], "accuracy": 0.5}


def make(folder: Path, **changes: object) -> Run:
    made = create("net", "abcdef0123", folder)
    (made / "checkpoint.pth").touch()
    return finish(made, {**RECORD, **changes})


def test_a_finished_run_is_found_by_its_fingerprint(tmp_path: Path) -> None:
    run = make(tmp_path)
    assert find_run("abcdef0123", tmp_path) == run.folder
    assert find_run("other", tmp_path) is None
    assert open_run(run.folder).labels == ("a", "b")


def test_the_newest_of_several_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []
    for stamp in ("20250101-000000", "20260101-000000", "20240101-000000"):
        monkeypatch.setattr("train.runs.time.strftime", lambda _, stamp=stamp: stamp)
        folders.append(make(tmp_path).folder)
    assert find_run("abcdef0123", tmp_path) == folders[1]
    assert [run.folder for run in finished(tmp_path)] == sorted(folders, reverse=True)


def test_two_runs_of_one_second_get_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.runs.time.strftime", lambda _: "20250101-000000")
    assert {make(tmp_path).id, make(tmp_path).id} == {"20250101-000000-net-abcdef", "20250101-000000-net-abcdef-2"}


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


def test_a_run_without_its_checkpoint_is_not_taken(tmp_path: Path) -> None:
    (make(tmp_path).folder / "checkpoint.pth").unlink()
    assert find_run("abcdef0123", tmp_path) is None


def test_the_record_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = create("net", "abcdef0123", tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        finish(folder, {**RECORD, "accuracy": float("nan")})
    assert not (folder / "run.json").exists()


def test_a_missing_run_has_its_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"the run \S*/gone is missing; train again, or name another of"):
        open_run(tmp_path / "gone")


def test_a_bare_id_is_looked_for_among_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path)
    monkeypatch.setattr(runs, "RUNS", tmp_path)
    assert open_run(Path(run.id)).folder == tmp_path / run.id


def test_a_real_run_survives_being_moved(tiny_run: Run, tmp_path: Path) -> None:
    moved = shutil.move(shutil.copytree(tiny_run.folder, tmp_path / "a"), tmp_path / "b")
    assert open_run(Path(moved)).record == json.loads((tiny_run.folder / "run.json").read_text())
