"""How a tuning ends at the terminal: the diff is shown, the file changes only where that is wanted."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import typer

import bench.tune
from bench.record import Journal, Record, read
from bench.tune import answer
from bench.tune.grid import Goal, Settings, Turn
from bench.tune.server import numbers_of
from cli.bench import tune
from host.signals import Interrupted
from serve.properties import change

NOW, BETTER = Settings(8, 1, 2, 2), Settings(16, 2, 2, 1)
FILE = '# mine\nmodels={"colours": {"1.0": {"batchSize": 8}}}\n'
Tell = Callable[..., None]


@pytest.fixture
def tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tell:
    """Return the command, whose tuning measured two configurations."""
    config = tmp_path / "config.properties"
    config.write_text(FILE)

    def run(p95_ms: float = 300.0, interruption: Interrupted | None = None, **options: object) -> None:
        journal = Journal.job(tmp_path / "a.journal", {})
        goal = Goal(p95_ms=500)
        for row in ([threads, size, 10.0 * size + 5] for threads in (1, 2) for size in (1, 2, 4)):
            journal.add("batch", row)
        journal.add("room", 9)
        for turn in (Turn(BETTER, 5.0, 100.0, p95_ms, 0, 500.0), Turn(NOW, 5.0, 60.0, 2 * p95_ms, 0, 833.0)):
            journal.add("turn", asdict(turn))
        result = answer("colours", NOW, goal, journal)
        result |= {"seconds": 9.0, "interrupted": interruption is not None}
        made = change(config, "colours", "1.0", numbers_of(Settings.of(result["best"])), None)
        record = Record.now("tune", "beeline bench tune", result, None)

        def measure(wanted: str, asked: Goal, *rest: object) -> object:
            assert (wanted, asked) == ("colours", goal)
            return record, made if result["holds"] else None, journal.path, interruption

        monkeypatch.setattr(bench.tune, "tune", measure)
        tune("colours", p95="500ms", config=config, **options)  # type: ignore[arg-type]

    return run


def test_without_a_terminal_the_diff_is_shown_and_nothing_changes(
    tell: Tell, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tell(out=tmp_path / "out.jsonl", as_json=True)
    said = capsys.readouterr()
    assert '-models={"colours": {"1.0": {"batchSize": 8}}}' in said.err
    assert '"batchSize": 16' in said.err
    assert (tmp_path / "config.properties").read_text() == FILE
    values = json.loads(said.out.splitlines()[-1])
    assert values["written"] is False
    assert '"batchSize": 16' in values["diff"]
    assert "<svg" in (tmp_path / "a.html").read_text()
    assert read(tmp_path / "out.jsonl")[0].result["sentence"] == values["sentence"]


def test_write_changes_the_file_without_a_question(
    tell: Tell, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tell(write=True)
    text = (tmp_path / "config.properties").read_text()
    assert text.startswith("# mine\n")
    assert '"batchSize": 16' in text
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("colours: batch size 16, workers 2")
    assert said[-1] == f"{tmp_path / 'config.properties'} is changed"
    # The next tuning starts from nothing.
    assert not (tmp_path / "a.journal").exists()


@pytest.mark.parametrize("yes", [True, False])
def test_a_terminal_is_asked_before_the_file_changes(
    tell: Tell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, yes: bool
) -> None:
    questions: list[str] = []

    def confirm(text: str, err: bool) -> bool:
        questions.append(text)
        return yes

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr(typer, "confirm", confirm)
    tell()
    assert questions == [f"write this to {tmp_path / 'config.properties'}?"]
    assert ((tmp_path / "config.properties").read_text() != FILE) is yes


def test_nothing_is_written_that_does_not_hold(tell: Tell, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended:
        tell(p95_ms=900, write=True)
    assert ended.value.exit_code == 1
    assert (tmp_path / "config.properties").read_text() == FILE
    assert "stays as it is: nothing measured holds the goal" in capsys.readouterr().out


def test_an_interruption_gives_the_answer_and_no_change(
    tell: Tell, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended:
        tell(interruption=Interrupted(signal.SIGINT), write=True)
    assert ended.value.exit_code == 130
    assert (tmp_path / "config.properties").read_text() == FILE
    said = capsys.readouterr().out
    assert said.startswith("colours: batch size 16")
    assert "the same command goes on from there" in said
    assert (tmp_path / "a.journal").exists()
