"""`beeline bench tune` on real servers: it answers, changes the file, leaves nothing, also when interrupted."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import bench.tune
from beeline.errors import Undetermined
from bench import record
from bench.record import Journal
from bench.tune import answer, grid
from bench.tune.grid import Goal, Settings, Turn
from bench.tune.server import numbers_of
from cli.bench import app
from serve.properties import load
from tests.bench.tune.conftest import left
from tests.conftest import BLUE, ROOT

# A line of the command's progress before servers start, and one after a turn.
STARTING, MEASURED = "threads 2: a batch costs", "requests a second, p95 "


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A copy of the configuration, and a picture beside it."""
    (tmp_path / "blue.png").write_bytes(BLUE)
    return Path(shutil.copy(ROOT / "config" / "config.properties", tmp_path))


def words(archive: Path, config: Path, *more: str) -> list[str]:
    """Return the command's words."""
    picture = str(config.parent / "blue.png")
    return ["tune", str(archive), "--picture", picture, "--config", str(config), "--clients", "8", "--json", *more]


@pytest.mark.bench
@pytest.mark.parametrize("server", ["torchserve", "mms"])
def test_a_short_tuning_answers_and_changes_the_file(
    temporary: Path, config: Path, colour_archive: Path, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    # The search is decided long before its time is up, however slow the machine is now.
    for name, value in {"BATCHES": (2, 8), "WORKERS": (1, 2)}.items():
        monkeypatch.setattr(grid, name, value)
    for name, seconds in {"THREADS": (1,), "_TURN": 1.5, "_LONG": 1.5, "_WAVE": 1, "_ROUNDS": 1}.items():
        monkeypatch.setattr(bench.tune, name, seconds)
    out = temporary / "out.jsonl"
    more = ("--p95", "30s", "--minutes", "9", "--server", server, "--write", "--out", str(out))
    done = CliRunner().invoke(app, words(colour_archive, config, *more))
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout.splitlines()[-1])
    assert values["holds"]
    assert values["tried"]
    assert not values["interrupted"]
    assert values["written"] == bool(values["diff"])
    read = load(config)
    best = numbers_of(Settings.of(values["best"]))
    assert read.models["colours"]["1.0"].numbers == {**read.models["colours"]["1.0"].numbers, **best}
    assert read.models["resnet18"]["1.0"].numbers["batchSize"] == 8
    assert "# Requests that the server holds" in config.read_text()
    assert "What was not measured, and why" in done.stderr
    assert "<svg" in Path(values["plot"]).read_text()
    kept = record.read(out)[0]
    assert (kept.kind, kept.result["sentence"]) == ("tune", values["sentence"])
    assert left(temporary) == []


def interrupted(command: list[str], when: str, number: signal.Signals) -> tuple[int, str, str]:
    """Run the command, send the signal once a line of its progress says `when`; return code, output and progress."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    watchdog = threading.Timer(240, process.kill)
    watchdog.start()
    try:
        said = ""
        while when not in said and (line := process.stderr.readline()):
            said += line
        process.send_signal(number)
        out, rest = process.communicate()
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
    return process.returncode, out, said + rest


@pytest.mark.bench
@pytest.mark.parametrize(
    ("goal", "when", "number", "expected"),
    [("--p95=5s", MEASURED, signal.SIGINT, 130), ("--rate=50", STARTING, signal.SIGTERM, 2)],
)
def test_an_interruption_leaves_no_process_and_a_journal_that_goes_on(
    temporary: Path, config: Path, colour_archive: Path, goal: str, when: str, number: signal.Signals, expected: int
) -> None:
    before, beeline = config.read_bytes(), [sys.executable, "-m", "cli", "bench"]
    command = [*beeline, *words(colour_archive, config, goal, "--minutes=3", "--write")]
    code, out, said = interrupted(command, when, number)
    assert left(temporary) == []
    assert code == expected, said
    assert config.read_bytes() == before
    assert list(temporary.glob("state/bench/*.journal"))
    if when == STARTING:
        assert "it ended before anything was measured" in said
        return
    # What was measured is the answer without measuring anything again.
    values = json.loads(out.splitlines()[-1])
    assert values["interrupted"]
    again = [*beeline, *words(colour_archive, config, goal, "--minutes=0")]
    done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    answered = json.loads(done.stdout.splitlines()[-1])
    assert (answered["tried"], answered["best"]) == (values["tried"], values["best"])
    assert left(temporary) == []


NOW, BETTER = Settings(8, 1, 2, 2), Settings(16, 2, 2, 1)


def answered(tmp_path: Path, goal: Goal, turns: Sequence[tuple[Settings, float, float, int]]) -> dict[str, Any]:
    journal = Journal.job(tmp_path / "a.journal", {})
    for row in ([threads, size, 10.0 * size + 5] for threads in (1, 2) for size in (1, 2, 4)):
        journal.add("batch", row)
    journal.add("room", 48)
    for settings, rate, p95, failed in [*turns] * 3:
        journal.add("turn", asdict(Turn(settings, 5.0, rate, p95, failed, goal.cost(rate, p95))))
    return answer("colours", NOW, goal, journal)


@pytest.mark.parametrize(
    ("goal", "turns", "said"),
    [
        (
            Goal(p95_ms=500),
            [(BETTER, 183.4, 281.0, 0), (NOW, 92.0, 480.0, 0)],
            "colours: batch size 16, workers 2, threads 1, delay 2 ms: 183.4 requests a second, p95 281 ms, which "
            "holds p95 of at most 500 ms with 50 clients; configured now is batch size 8, workers 1, threads 2, "
            "delay 2 ms: 92.0 requests a second, p95 480 ms: it takes 1.99 times as long.",
        ),
        (Goal(p95_ms=500), [(BETTER, 183.4, 281.0, 0), (NOW, 92.0, 580.0, 0)], "p95 580 ms: it does not hold that."),
        (Goal(p95_ms=500), [(NOW, 183.4, 281.0, 0)], "; it is what is configured now."),
        (
            Goal(p95_ms=500),
            [(BETTER, 92.0, 700.0, 0), (NOW, 80.0, 800.0, 0)],
            "colours: nothing measured holds p95 of at most 500 ms with 50 clients; the nearest is batch size 16, "
            "workers 2, threads 1, delay 2 ms: 92.0 requests a second, p95 700 ms; about 35 clients at a time would be "
            "within it.",
        ),
        (Goal(p95_ms=500), [(BETTER, 92.0, 300.0, 2)], "6 failed; look into why requests fail with `beeline bench lo"),
        (Goal(rate=60), [(BETTER, 60.0, 40.0, 0), (NOW, 60.0, 80.0, 0)], "p95 80 ms: it takes 2.00 times as long."),
        (Goal(rate=60), [(BETTER, 40.0, 4000.0, 0)], "lower the rate, or serve it from more cores."),
    ],
)
def test_the_sentence(tmp_path: Path, goal: Goal, turns: list[tuple[Settings, float, float, int]], said: str) -> None:
    sentence = answered(tmp_path, goal, turns)["sentence"]
    assert said in sentence, sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("goal", [Goal(p95_ms=500), Goal(rate=60), Goal(rate=6000)])
def test_the_record_has_what_a_report_needs_and_why_the_rest_was_not_measured(tmp_path: Path, goal: Goal) -> None:
    result = answered(tmp_path, goal, [(BETTER, 50.0, 300.0, 0)])
    json.dumps(result, allow_nan=False)
    assert [set(each) for each in result["fits"]] == [{"threads", "a_ms", "b_ms", "error"}] * 2
    assert Settings.of(result["best"]) == Settings.of(result["tried"][0]) == BETTER
    reasons = {each["what"]: each["why"] for each in result["pruned"]}
    assert all(reasons.values())
    assert str(BETTER) not in reasons
    # What was promising and not measured has its forecast.
    assert any("nothing near it was in the lead" in reason for reason in reasons.values())


def test_without_a_turn_there_is_no_answer(tmp_path: Path) -> None:
    with pytest.raises(Undetermined, match="it ended before anything was measured"):
        answered(tmp_path, Goal(p95_ms=500), [])
