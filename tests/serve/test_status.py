"""Counts of answers, added up over workers."""

from __future__ import annotations

import json
from pathlib import Path

from serve.status import answers


def test_answers_of_all_workers_are_added_up(tmp_path: Path) -> None:
    for pid, counts in ((1, {"200": 3, "415": 1}), (2, {"200": 4})):
        (tmp_path / f"{pid}.json").write_text(json.dumps({"pid": pid, "model": "fake", "answers": counts}))
    assert answers(tmp_path) == {"fake": {"200": 7, "415": 1}}


def test_a_file_of_another_form_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "1.json").write_text("half a fi")
    (tmp_path / "2.json").write_text("[]")
    (tmp_path / "3.json").write_text(json.dumps({"model": "fake", "answers": {"200": 1}}))
    assert answers(tmp_path) == {"fake": {"200": 1}}


def test_without_a_folder_there_are_none(tmp_path: Path) -> None:
    assert answers(tmp_path / "nothing") == {}
