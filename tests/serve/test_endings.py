"""Real TorchServe and Multi Model Server, ended in every way: nothing of them is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from host import processes
from serve import instance
from serve.client import InferenceClient
from serve.instance import MARK, down
from tests.conftest import ROOT
from tests.serve.conftest import MakeArchive, wait_for

pytestmark = pytest.mark.server
COMMAND = [sys.executable, "-c", "from cli.serve import app; app()"]
# Every way for one server; for the other those after which its own processes are in another state. SIGTERM becomes the
# same exception as SIGINT (tests/host/test_signals.py).
WAYS = [("torchserve", way) for way in ("SIGINT", "supervisor", "starting", "down")]
WAYS += [("mms", "starting")]


@pytest.mark.parametrize(("server", "way"), WAYS)
def test_nothing_is_left_however_it_ends(
    server: str, way: str, make_fake: MakeArchive, environ: dict[str, str], tmp_path: Path, state_home: Path
) -> None:
    name = f"{server}-{way}"
    archive = make_fake(tmp_path, expected="red")
    command = [*COMMAND, "up", "--server", server, "--mar", str(archive), "--port", "0", "--name", name, "--json"]
    found = instance.named(state_home, name)
    with subprocess.Popen(
        command, cwd=ROOT, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as foreground:
        assert foreground.stdout is not None
        if way == "starting":
            wait_for(lambda: (state := found.read()) is not None and state.server_process is not None)
        else:
            assert json.loads(foreground.stdout.readline())["name"] == name
        state = found.read()
        assert state is not None
        assert state.server_process is not None
        assert state.supervisor is not None
        target = {"java": state.server_process, "supervisor": state.supervisor}.get(way, foreground.pid)
        number = signal.SIGINT if way == "SIGINT" else signal.SIGKILL
        if way == "down":
            down(state_home, name)
        else:
            os.kill(target, number)
        _, said = foreground.communicate(timeout=60)
    expected = {"SIGINT": 0, "down": 0, "supervisor": 1, "starting": -signal.SIGKILL}[way]
    assert foreground.returncode == expected, said
    wait_for(lambda: not found.alive())
    assert processes.marked(MARK, state.mark) == []
    assert not Path(state.temporary).exists()
    assert found.read() is None


def test_a_detached_server_outlives_its_command_until_down(
    make_fake: MakeArchive, environ: dict[str, str], tmp_path: Path, state_home: Path
) -> None:
    archive = make_fake(tmp_path, expected="red")
    command = [*COMMAND, "up", "--mar", str(archive), "--port", "0", "--name", "detached", "--detach", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120, check=True)
    started = json.loads(done.stdout.splitlines()[-1])
    with InferenceClient(started["url"]) as client:
        answer = client.predict("fake", b"anything")
    # Workers must not find this repository, which is installed in their environment.
    assert answer.json() == {"red": 0.9, "other": 0.1, "ours": 0}
    assert down(state_home, "detached") == {"detached": []}
    assert processes.marked(MARK, f"{state_home / 'detached'}:") == []
