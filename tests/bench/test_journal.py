"""The journal keeps each figure as it is measured, and goes on after whatever broke it off."""

from __future__ import annotations

from pathlib import Path

import pytest

from beeline.errors import ConfigError
from bench.journal import Journal, state_folder

ABOUT = {"model": "colours", "goal": {"p95_ms": 500.0}}


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    made = Journal.begin(tmp_path / "folder" / "a.journal", ABOUT)
    made.add("batch", [2, 8, 41.5])
    made.add("turn", {"per_second": 3.5, "p95_ms": None})
    return made


def test_what_was_kept_is_read_again(journal: Journal) -> None:
    again = Journal.resume(journal.path, ABOUT)
    assert again == journal
    assert again.of("batch") == [[2, 8, 41.5]]
    assert again.of("none") == []


def test_a_line_that_broke_off_is_left_out_and_does_not_spoil_the_next(journal: Journal) -> None:
    journal.path.write_text(journal.path.read_text()[:-20])
    again = Journal.resume(journal.path, ABOUT)
    assert again.of("turn") == []
    again.add("turn", 7)
    assert Journal.resume(journal.path, ABOUT).of("turn") == [7]


def test_what_a_job_has_is_not_measured_again(journal: Journal) -> None:
    job = Journal.job(journal.path, ABOUT)
    assert job.once("batch", lambda: pytest.fail("it is there")) == [2, 8, 41.5]
    assert job.once("other", lambda: 1) == 1
    assert Journal.job(journal.path, ABOUT).of("other") == [1]
    # Another job of that name begins.
    assert Journal.job(journal.path, {**ABOUT, "model": "other"}).rows == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "which is not there"),
        ("", "which is no journal"),
        ('{"kind": "load"}\n', "which is no journal"),
        ('{"schema": 2, "about": {"model": "other"}}\n', "whose model is 'other' and not 'colours'"),
    ],
)
def test_a_file_that_does_not_fit_is_one_sentence(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "a.journal"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Journal.resume(path, ABOUT)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_journals_lie_in_the_state_folder(tmp_path: Path) -> None:
    assert state_folder({"BEELINE_STATE": str(tmp_path)}) == tmp_path / "bench"
    assert state_folder({}).parts[-2:] == (".beeline", "bench")
