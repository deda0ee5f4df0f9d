"""Counts of answers, added up over workers."""

from __future__ import annotations

from pathlib import Path

from beeline.answer import Answer
from beeline.metrics import Metrics
from serve.status import answers


def count(folder: Path, model: str, **statuses: int) -> None:
    metrics = Metrics(model, "1.0", {}, folder)
    for status, number in statuses.items():
        metrics.count([Answer(int(status[1:]), "", "")] * number, [], {})
    metrics.write()


def test_answers_of_all_workers_are_added_up(tmp_path: Path) -> None:
    count(tmp_path, "colours", _200=3, _415=1)
    count(tmp_path, "colours", _200=4)
    count(tmp_path, "other", _500=1)
    assert answers(tmp_path) == {"colours": {"200": 7, "415": 1}, "other": {"500": 1}}


def test_a_file_of_another_form_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "1.json").write_text("half a fi")
    (tmp_path / "2.json").write_text("[]")
    count(tmp_path, "colours", _200=1)
    assert answers(tmp_path) == {"colours": {"200": 1}}


def test_without_a_folder_there_are_none(tmp_path: Path) -> None:
    assert answers(tmp_path / "nothing") == {}
