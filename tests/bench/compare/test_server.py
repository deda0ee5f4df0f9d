"""A peer's processes on this machine: started, asked, weighed, stopped with all they started."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from beeline.errors import BeelineError
from bench.compare import server
from bench.compare.comparison import run
from bench.compare.peers import Peer, raw
from bench.compare.server import Setup, ask, running
from bench.pictures import Pictures
from bench.record import Journal
from bench.tune.grid import Settings
from serve.servers.protocol import clean
from tests.conftest import RED

pytestmark = pytest.mark.bench

SERVER = """
import http.server, json, os, signal, subprocess, sys

class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"green": 0.1, "red": 0.9}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        pass

asked = json.loads(os.environ["PEER"])
with open(asked["scratch"] + "/threads", "w") as file:
    file.write("3")
# A child in a session of its own, which nobody waits for and which ignores SIGTERM.
ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", ignore], start_new_session=True)
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("starting", flush=True)
if "broken" in sys.argv:
    raise SystemExit("ValueError: no such model")
http.server.ThreadingHTTPServer(("127.0.0.1", asked["port"]), Answer).serve_forever()
"""

# A comparison in a process of its own.
SCRIPT = """
import sys
from pathlib import Path
from bench.compare import server
from bench.compare.comparison import run
from bench.compare.peers import Peer, raw
from bench.compare.server import Setup
from bench.pictures import Pictures
from bench.record import Journal
from bench.tune.grid import Settings
from host import signals

server._GRACE = 0.5
here = Path(sys.argv[1])
peer = Peer("ours-tiny", Settings(1, 1, 0, 0), raw("/p"), f"{sys.executable} {here}/server.py")
setup = Setup(here, here, here, "fp32", Pictures("p", ("a",), (b"x",)), 1, 600)
with signals.as_exceptions():
    result = run([peer], setup, 1, Journal.job(here / "journal", {}), print)
print("interrupted" if result["interrupted"] else "not", flush=True)
"""

MakePeer = Callable[..., Peer]


@pytest.fixture
def make_peer(tmp_path: Path) -> MakePeer:
    """A tiny server in this Python."""
    (tmp_path / "server.py").write_text(SERVER)

    def make(name: str = "tiny", word: str = "") -> Peer:
        return Peer(name, Settings(1, 2, 0, 0), raw("/predict"), f"{{python}} {tmp_path}/server.py {word}")

    return make


@pytest.fixture
def shared(tmp_path: Path) -> Setup:
    red = Pictures("p", ("a.png",), (RED,))
    return Setup(tmp_path / "m.mar", tmp_path / "config.properties", tmp_path, "bf16", red, 2, 0.5, red, ["red"])


def ended(processes: list[psutil.Process]) -> bool:
    """Wait until none of them lives; a zombie of another parent counts as ended."""
    _, alive = psutil.wait_procs(processes, timeout=10)
    return not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_GRACE", 0.5)


@pytest.mark.parametrize("word", ["", "stubborn"])
def test_a_peer_is_started_asked_weighed_and_stopped_with_its_children(
    make_peer: MakePeer, shared: Setup, word: str
) -> None:
    with running(make_peer("tiny", word), shared) as started:
        started.wait(RED)
        assert [label for label, _ in ask(started, (RED,) * 5, 2)] == ["red"] * 5
        processes = started.processes()
        assert len(processes) == 2
        assert started.memory_mb() > 1
        assert started.threads() == 3
    assert ended(processes)
    assert not started.scratch.exists()


def test_a_command_that_is_not_there_is_an_error_and_leaves_no_folder(
    shared: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    peer = Peer("gone", Settings(1, 1, 0, 0), raw("/"), "/no/such/command")
    with pytest.raises(BeelineError, match="/no/such/command does not start"), running(peer, shared):
        pass
    assert list(tmp_path.glob("beeline-*")) == []


def test_a_whole_comparison_of_one_server_under_three_names_and_of_one_that_ends_by_itself(
    make_peer: MakePeer, shared: Setup, tmp_path: Path
) -> None:
    peers = [make_peer("one"), make_peer("two"), make_peer("ours-mine"), make_peer("ours-broken", "broken")]
    result = run(peers, shared, 1, Journal.job(tmp_path / "journal", {}), lambda line: None)
    *good, broken = result["rows"]
    for row in good:
        assert (row["error"], row["failed"], row["agreement"], row["threads"]) == (None, 0, 1.0, 3)
        assert row["per_second"][0] > 0
        assert row["memory_mb"] > 1
    assert [row["precision"] for row in good] == ["fp32 TorchScript", "fp32 TorchScript", "bf16"]
    assert broken["error"] == "ours-broken ended with exit code 1; its log says: ValueError: no such model"
    assert result["aa"]["server"] == "ours-mine"


def a_comparison(folder: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """Start one in a process of its own; return it, and what it has started once its server runs."""
    (folder / "server.py").write_text(SERVER)
    (folder / "compare.py").write_text(SCRIPT)
    command = [sys.executable, str(folder / "compare.py"), str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=clean(os.environ))
    deadline = time.monotonic() + 60
    while len(children := psutil.Process(process.pid).children(recursive=True)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process, children


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_comparison_that_is_asked_to_end_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    process, children = a_comparison(tmp_path)
    try:
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert said.splitlines()[-1] == "interrupted"
    assert ended(children)


def test_what_a_killed_comparison_left_is_removed_by_the_next(tmp_path: Path) -> None:
    process, children = a_comparison(tmp_path)
    scratch = Path(children[0].cwd())
    # Folders of others, whose names are only similar.
    others = [scratch.with_name(name) for name in ("bp-99999-mine", "bp-2026-11-27-backup")]
    for other in others:
        other.mkdir(exist_ok=True)
    process.kill()
    process.communicate()
    assert {each.pid for each in children if each.is_running()} >= set(server.stop_leftovers())
    assert ended(children)
    assert not scratch.exists()
    for other in others:
        other.rmdir()
