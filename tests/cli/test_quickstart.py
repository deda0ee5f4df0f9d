"""`make serve`, ended while it trains: nothing that it started is left."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from train.generate import generate

pytestmark = pytest.mark.server


@pytest.fixture
def started(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[psutil.Process]]]:
    """Start the command under a shell, as make does, and wait until it trains."""
    generate(tmp_path / "pictures", train=40, val=8)
    command = [sys.executable, "-m", "cli", "quickstart", "--data", str(tmp_path / "pictures"), "--port", "0"]
    command += ["fit=scratch", "fit.epochs=500"]
    with (tmp_path / "log").open("wb") as log:
        # The shell would replace itself without the `true`.
        shell = ["sh", "-c", '"$@"; true', "sh", *command]
        process = subprocess.Popen(shell, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 120
    while b"\nrun: " not in (text := (tmp_path / "log").read_bytes()):
        assert process.poll() is None, text
        assert time.monotonic() < deadline, text
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2
    yield process, family
    for left in family:
        if left.is_running():
            left.kill()
    run = re.search(r"^run: (.*)$", text.decode(), re.MULTILINE)
    assert run is not None
    shutil.rmtree(run[1])


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGKILL of its parent", "SIGKILL of the command"])
def test_nothing_is_left(started: tuple[subprocess.Popen[bytes], list[psutil.Process]], how: str) -> None:
    process, family = started
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    elif how == "SIGKILL of its parent":
        # The kernel sends SIGTERM to the command then.
        process.kill()
    else:
        next(one for one in family if "quickstart" in one.cmdline()).kill()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert [one.cmdline() for one in alive] == []
    process.wait(timeout=30)
