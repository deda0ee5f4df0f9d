"""The journal keeps each turn as it ends, and goes on after whatever broke it off."""

from __future__ import annotations

from pathlib import Path

import pytest

from beeline.errors import ConfigError
from bench.tune.settings import Settings
from bench.tune.turns import Journal, Round, Turn

ABOUT = {"model": "colours", "goal": {"p95_ms": 500.0}}
SETTINGS = Settings(8, 2, 2, 1)
TURN = Turn(SETTINGS, 1, 4.0, 100.5, 41.25, 0, False, 7.5)


def written(path: Path) -> Journal:
    journal = Journal.begin(path, ABOUT)
    journal.climb(2, 8, 41.5)
    journal.note("cost", {"memory": 5})
    journal.plan(Round(1, 0, (SETTINGS,)))
    journal.add(TURN)
    return journal


def test_what_was_kept_is_read_again(tmp_path: Path) -> None:
    journal = written(tmp_path / "folder" / "a.journal")
    again = Journal.resume(journal.path, ABOUT)
    assert again == journal
    assert again.turns == [TURN]


def test_a_line_that_broke_off_is_left_out_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    journal = written(tmp_path / "a.journal")
    text = journal.path.read_text()
    journal.path.write_text(text[:-20])
    again = Journal.resume(journal.path, ABOUT)
    assert again.turns == []
    again.add(TURN)
    assert Journal.resume(journal.path, ABOUT).turns == [TURN]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "which is not there"),
        ("", "which no run of this kind wrote"),
        ('{"kind": "load"}\n', "which no run of this kind wrote"),
        ('{"schema": 1, "about": {"model": "other"}}\n', "whose model is 'other' and not 'colours'"),
    ],
)
def test_a_file_that_does_not_fit_is_one_sentence(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "a.journal"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Journal.resume(path, ABOUT)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_turn_takes_from_a_loads_summary_what_decides() -> None:
    summary = {
        "seconds": 4.0,
        "good_per_second": 100.0,
        "p95_ms": 50.0,
        "failed": 3,
        "batch_sizes": {"8": 8, "2": 2},
        "backlog": {"growing": True},
    }
    turn = Turn.of(SETTINGS, 2, summary)
    # Eight requests in one batch of 8 and two in one of 2.
    assert turn.batch == 5.0
    assert (turn.round, turn.failed, turn.growing) == (2, 3, True)
    assert Turn.read(turn.to_dict()) == turn
    assert str(turn) == (
        "batch 8, 2 workers, delay 2 ms, 1 thread each: 100.0/s, p95 50 ms, 3 failed, ever more wait (4.0 s)"
    )
