"""`beeline bench sweep` as a person runs it: a run or an archive, a record, Ctrl-C in the middle."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from beeline.errors import Undetermined
from bench.record import read
from cli.bench import app
from cli.sources import archive_of
from tests.bench.test_sweep import faking, with_handler
from tests.cli.test_main import beeline
from tests.conftest import BLUE, RED, ROOT


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "red.png").write_bytes(RED)
    (folder / "blue.png").write_bytes(BLUE)
    return folder


def test_an_archive_gives_rows_and_a_record(colour_archive: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep.jsonl"
    fake = with_handler(colour_archive, tmp_path / "fake.mar", faking())
    words = ["--pictures", str(pictures), "--out", str(out), "--most=2", "--repeats=1", "--device=cpu", "--json"]
    done = beeline("bench", "sweep", str(fake), *words)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert [row["batch"] for row in result["rows"]] == [1, 2]
    assert "batch 2: ms per image: forward alone" in done.stderr
    (record,) = read(out)
    assert (record.kind, record.result) == ("sweep", result)
    assert record.pictures["count"] == 2
    # Only the last part of each path, because a record must not name this machine's folders.
    assert record.command.startswith("beeline bench sweep fake.mar --pictures pictures --out sweep.jsonl")
    assert str(tmp_path) not in out.read_text()


def test_ctrl_c_keeps_the_rows_so_far_and_leaves_nothing(colour_archive: Path, pictures: Path, tmp_path: Path) -> None:
    hanging = with_handler(colour_archive, tmp_path / "hanging.mar", faking("time.sleep(3600)"))
    words = ["--pictures", str(pictures), "--least", "64", "--repeats", "1", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", "bench", "sweep", str(hanging), *words],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        while not (line := process.stderr.readline()).startswith("batch 2:"):
            assert line, "it ended before a row was there"
        workers = psutil.Process(process.pid).children(recursive=True)
        assert workers
        os.kill(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert re.search(r"ended +interrupted \(SIGINT\)", said)
    assert not [each for each in workers if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("sweep", ["--most=0", "--least=0", "--repeats=0", "--threads=0", "--memory=0"]),
        ("load", ["--clients=0", "--clients=901", "--rate=-2", "--seconds=0", "--deadline=0", "--warm-up=-1"]),
        ("tune", ["--clients=0", "--clients=901", "--rate=0", "--minutes=-1"]),
        ("compare", ["--clients=0", "--clients=901", "--rounds=0", "--seconds=0"]),
    ],
)
def test_a_number_out_of_range_is_refused(command: str, options: list[str]) -> None:
    for option in options:
        done = CliRunner().invoke(app, [command, "x", "--picture=x", option])
        assert done.exit_code == 2
        assert f"Invalid value for '{option.partition('=')[0]}'" in done.output


def test_the_old_name_says_the_new_one() -> None:
    with pytest.raises(Undetermined, match="`beeline bench table` is now `beeline bench sweep`"):
        CliRunner().invoke(app, ["table", "some.mar", "--most", "2"], catch_exceptions=False)


def test_a_run_is_measured_as_the_archive_that_it_would_become(colour_model: Path) -> None:
    with archive_of(colour_model, print) as archive:
        assert archive.name == "colours.mar"
        assert archive.is_file()
    assert not archive.exists()
