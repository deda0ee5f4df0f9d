"""How a tuning ends at the terminal: the diff is shown, the file changes only where that is wanted."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from bench.record import Record, read
from bench.tune import candidates, written
from bench.tune.answer import Answer
from bench.tune.forecast import Curve, Forecaster
from bench.tune.goal import Goal
from bench.tune.settings import Settings
from bench.tune.tune import Tuned
from bench.tune.turns import Turn
from cli.tune import tell
from host.signals import Interrupted

NOW, BETTER = Settings(8, 1, 2, 2), Settings(16, 2, 2, 1)
FILE = '# mine\nmodels={"colours": {"1.0": {"batchSize": 8}}}\n'
MakeTuned = Callable[..., Tuned]


@pytest.fixture
def make_tuned(tmp_path: Path) -> MakeTuned:
    """Return what came of a tuning that measured two configurations."""
    config = tmp_path / "config.properties"
    config.write_text(FILE)

    def make(p95_ms: float = 300.0, asked: Interrupted | None = None) -> Tuned:
        goal = Goal(p95_ms=500)
        curves = {threads: Curve.through([(1, 15.0), (8, 90.0)]) for threads in (1, 2)}
        forecaster = Forecaster(curves, goal, 2)
        field = candidates.field(forecaster, 9, (NOW,))
        turns = [Turn(BETTER, 1, 5.0, 100.0, p95_ms, 0), Turn(NOW, 1, 5.0, 60.0, 2 * p95_ms, 0)]
        answer = Answer.of("colours", NOW, forecaster, field, turns)
        result = {**answer.to_dict(), "seconds": 9.0, "interrupted": asked is not None}
        change = written.change(config, "colours", "1.0", answer.settings, 1) if answer.holds else None
        record = Record.now("tune", "beeline bench tune", result, {})
        return Tuned(answer, record, change, tmp_path / "a.journal", asked)

    return make


def test_without_a_terminal_the_diff_is_shown_and_nothing_changes(
    make_tuned: MakeTuned, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tell(make_tuned(), tmp_path / "out.jsonl", write=False, as_json=True)
    said = capsys.readouterr()
    assert '-models={"colours": {"1.0": {"batchSize": 8}}}' in said.err
    assert '"batchSize": 16' in said.err
    assert (tmp_path / "config.properties").read_text() == FILE
    values = json.loads(said.out.splitlines()[-1])
    assert values["written"] is False
    assert '"batchSize": 16' in values["diff"]
    assert "<svg" in (tmp_path / "a.html").read_text()
    assert read(tmp_path / "out.jsonl")[0].result["sentence"] == values["sentence"]


def test_asked_to_write_it_writes(make_tuned: MakeTuned, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell(make_tuned(), None, write=True, as_json=False)
    text = (tmp_path / "config.properties").read_text()
    assert text.startswith("# mine\n")
    assert '"batchSize": 16' in text
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("colours: batch 16, 2 workers")
    assert said[-1] == f"{tmp_path / 'config.properties'} is changed"


@pytest.mark.parametrize("yes", [True, False])
def test_at_a_terminal_the_person_is_asked(
    make_tuned: MakeTuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, yes: bool
) -> None:
    questions: list[str] = []

    def confirm(text: str, err: bool) -> bool:
        questions.append(text)
        return yes

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr(typer, "confirm", confirm)
    tell(make_tuned(), None, write=False, as_json=False)
    assert questions == [f"write this to {tmp_path / 'config.properties'}?"]
    assert ((tmp_path / "config.properties").read_text() != FILE) is yes


def test_nothing_is_written_that_does_not_hold(
    make_tuned: MakeTuned, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended:
        tell(make_tuned(p95_ms=900), None, write=True, as_json=False)
    assert ended.value.exit_code == 1
    assert (tmp_path / "config.properties").read_text() == FILE
    assert "stays as it is: nothing measured holds the goal" in capsys.readouterr().out


def test_who_interrupts_gets_the_answer_and_no_change(
    make_tuned: MakeTuned, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended:
        tell(make_tuned(asked=Interrupted(signal.SIGINT)), None, write=True, as_json=False)
    assert ended.value.exit_code == 130
    assert (tmp_path / "config.properties").read_text() == FILE
    said = capsys.readouterr().out
    assert said.startswith("colours: batch 16")
    assert f"--resume {tmp_path / 'a.journal'} goes on from there" in said
