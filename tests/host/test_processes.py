"""A child in a group of its own ends with what it started, and with its parent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from host import ROOT, processes
from host.processes import end_group, start_group

# Starts a process of its own and, last, says its id.
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdout=subprocess.DEVNULL)
print("a line for the log", file=sys.stderr)
print(child.pid, flush=True)
"""


@pytest.mark.parametrize("end", ["input()", "", "import os; os.kill(os.getpid(), 9)"], ids=["lives", "ended", "killed"])
def test_a_group_ends_with_all_that_its_leader_started(tmp_path: Path, end: str) -> None:
    process = start_group([sys.executable, "-c", PARENT + end], tmp_path / "log", tmp_path, os.environ)
    assert process.stdin is not None
    assert process.stdout is not None
    grandchild = psutil.Process(int(process.stdout.readline()))
    assert os.getsid(process.pid) == process.pid
    if end != "input()":
        process.wait(10)
        # Never flushed, so that closing the pipe fails.
        process.stdin.write(b"for nobody")
    end_group(process)
    grandchild.wait(10)
    assert process.returncode is not None
    assert process.stdin.closed
    assert process.stdout.closed
    assert (tmp_path / "log").read_text() == "a line for the log\n"


def test_a_group_that_is_gone_may_end_again_and_a_stranger_with_its_id_lives(tmp_path: Path) -> None:
    process = start_group(["true"], tmp_path / "log", tmp_path, os.environ)
    process.wait(10)
    end_group(process)
    assert process.returncode == 0
    stranger = start_group(["sleep", "600"], tmp_path / "log", tmp_path, os.environ)
    process.pid = stranger.pid
    end_group(process)
    assert stranger.poll() is None
    end_group(stranger)


def test_a_child_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from host.processes import start_group\n"
        f"child = start_group(['sleep', '600'], Path({str(tmp_path / 'log')!r}), Path('/'), os.environ)\n"
        "print(child.pid, flush=True); input()"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "handlers")}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        child.wait(10)


@pytest.mark.parametrize(("prefix", "folder"), [("", None), ("-", Path("/"))])
def test_a_search_that_would_mean_every_process_of_the_machine_is_refused(prefix: str, folder: Path | None) -> None:
    with pytest.raises(ValueError, match="would mean every process"):
        processes.marked("BEELINE_INSTANCE", prefix, folder)
