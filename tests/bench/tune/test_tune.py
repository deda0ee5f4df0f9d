"""`beeline bench tune` on real servers: it answers, changes the file, leaves nothing, also when interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
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
from cli.bench import app
from host import processes
from serve.instance import MARK
from serve.properties import load
from tests.conftest import BLUE, ROOT

COMMAND = [sys.executable, "-m", "cli", "bench"]
# A line of the command's progress, when servers start, and once a turn was measured.
STARTING, MEASURED = "threads 2: a batch costs", "requests a second, p95 "


@dataclass(frozen=True)
class Place:
    """A short temporary folder (sockets have short paths), a picture, and a copy of the configuration."""

    folder: Path
    picture: Path
    config: Path

    def command(self, archive: Path, *more: str) -> list[str]:
        options = ("--picture", str(self.picture), "--config", str(self.config), "--clients", "8", "--json")
        return [*COMMAND, "tune", str(archive), *options, *more]

    @property
    def environ(self) -> dict[str, str]:
        ours = ("BEELINE_", "BATCH_SIZE", "WORKERS", "LINGER_MS")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
        return {**kept, "TMPDIR": str(self.folder), "BEELINE_STATE": str(self.folder / "state")}

    def left(self) -> tuple[list[Any], list[str]]:
        """Return processes and temporary folders that are still there."""
        inside = [path.name for path in self.folder.iterdir() if path.name.startswith("beeline-")]
        return processes.marked(MARK, str(self.folder), self.folder), inside


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp")).resolve()
    picture = tmp_path / "blue.png"
    picture.write_bytes(BLUE)
    config = tmp_path / "config.properties"
    config.write_bytes((ROOT / "config" / "config.properties").read_bytes())
    yield Place(folder, picture, config)
    processes.stop_marked(MARK, str(folder), grace=0, folder=folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the search so short that it is decided long before its time is up, however slow the machine is now."""
    for name, value in {"BATCHES": (2, 8), "WORKERS": (1, 2)}.items():
        monkeypatch.setattr(grid, name, value)
    for name, seconds in {"THREADS": (1,), "_TURN": 1.5, "_LONG": 1.5, "_WAVE": 1, "_ROUNDS": 1}.items():
        monkeypatch.setattr(bench.tune, name, seconds)


@pytest.mark.bench
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("server", ["torchserve", "mms"])
def test_a_short_tuning_answers_and_changes_the_file(
    place: Place, colour_archive: Path, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    out = place.folder / "out.jsonl"
    options = ("--p95", "30s", "--minutes", "9", "--server", server, "--write", "--out", str(out))
    monkeypatch.setattr(tempfile, "tempdir", None)
    for name in set(os.environ) - set(place.environ):
        monkeypatch.delenv(name)
    for name, value in place.environ.items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(app, place.command(colour_archive, *options)[len(COMMAND) :])
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout.splitlines()[-1])
    assert values["holds"]
    assert values["tried"]
    assert not values["interrupted"]
    assert values["written"] == bool(values["diff"])
    best = Settings.of(values["best"])
    read = load(place.config)
    entry = read.models["colours"]["1.0"].numbers
    assert (entry["batchSize"], entry["minWorkers"], entry["maxBatchDelay"]) == (
        best.batch_size,
        best.workers,
        best.max_batch_delay,
    )
    assert read.models["resnet18"]["1.0"].numbers["batchSize"] == 8
    assert "# Requests that the server holds" in place.config.read_text()
    assert "What was not measured, and why" in done.stderr
    assert "<svg" in Path(values["plot"]).read_text()
    kept = record.read(out)[0]
    assert (kept.kind, kept.result["sentence"]) == ("tune", values["sentence"])
    assert place.left() == ([], [])


def interrupted(place: Place, command: list[str], when: str, number: signal.Signals) -> tuple[int, dict[str, Any], str]:
    """Run the command, send the signal once a line of its progress says `when`, return how it ended."""
    process = subprocess.Popen(
        command, env=place.environ, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert process.stdout is not None
    # Whatever goes wrong, the test ends.
    watchdog = threading.Timer(240, process.kill)
    watchdog.start()
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if when in line:
                process.send_signal(number)
                break
        said += process.stderr.readlines()
        out = process.stdout.read()
        code = process.wait()
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        process.stderr.close()
        process.stdout.close()
    text = "".join(said)
    return code, json.loads(out.splitlines()[-1]) if out else {}, text


@pytest.mark.bench
def test_ctrl_c_in_the_middle_leaves_an_answer_that_goes_on(place: Place, colour_archive: Path) -> None:
    before = place.config.read_bytes()
    goal = ("--p95", "5s", "--minutes", "3")
    code, values, said = interrupted(place, place.command(colour_archive, *goal), MEASURED, signal.SIGINT)
    assert place.left() == ([], [])
    assert code == 128 + signal.SIGINT, said
    assert values["interrupted"]
    assert values["holds"]
    assert place.config.read_bytes() == before
    # What was measured is the answer without measuring anything again.
    again = place.command(colour_archive, "--p95", "5s", "--minutes", "0")
    done = subprocess.run(again, env=place.environ, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["tried"] == values["tried"]
    assert answer["best"] == values["best"]
    assert place.left() == ([], [])


@pytest.mark.bench
def test_sigterm_while_servers_start_leaves_what_goes_on_and_nothing_else(place: Place, colour_archive: Path) -> None:
    before = place.config.read_bytes()
    command = place.command(colour_archive, "--rate", "50", "--minutes", "3", "--write")
    code, said = interrupted(place, command, STARTING, signal.SIGTERM)[::2]
    assert place.left() == ([], [])
    assert code == 2, said
    assert "it ended before anything was measured" in said
    assert place.config.read_bytes() == before
    assert list((place.folder / "state" / "bench").glob("*.journal"))


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
        (
            Goal(p95_ms=500),
            [(BETTER, 183.4, 281.0, 0), (NOW, 92.0, 580.0, 0)],
            "92.0 requests a second, p95 580 ms: it does not hold that.",
        ),
        (Goal(p95_ms=500), [(NOW, 183.4, 281.0, 0)], "; it is what is configured now."),
        (
            Goal(p95_ms=500),
            [(BETTER, 92.0, 700.0, 0), (NOW, 80.0, 800.0, 0)],
            "colours: nothing measured holds p95 of at most 500 ms with 50 clients; the nearest is batch size 16, "
            "workers 2, threads 1, delay 2 ms: 92.0 requests a second, p95 700 ms; about 35 clients at a time would be "
            "within it.",
        ),
        (
            Goal(p95_ms=500),
            [(BETTER, 92.0, 300.0, 2)],
            "p95 300 ms, 6 failed; look into why requests fail with `beeline bench load`.",
        ),
        (
            Goal(rate=60),
            [(BETTER, 60.0, 40.0, 0), (NOW, 60.0, 80.0, 0)],
            "60.0 requests a second, p95 80 ms: it takes 2.00 times as long.",
        ),
        (Goal(rate=60), [(BETTER, 40.0, 4000.0, 0)], "lower the rate, or serve it from more cores."),
    ],
)
def test_the_sentence(tmp_path: Path, goal: Goal, turns: list[tuple[Settings, float, float, int]], said: str) -> None:
    sentence = answered(tmp_path, goal, turns)["sentence"]
    assert said in sentence, sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("goal", [Goal(p95_ms=500), Goal(rate=60), Goal(rate=6000)])
def test_the_record_has_what_a_report_needs_and_says_why_the_rest_is_not_there(tmp_path: Path, goal: Goal) -> None:
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
