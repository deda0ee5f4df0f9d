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
from bench.compare.comparison import Load, run
from bench.compare.peers import Numbers, Peer, raw
from bench.compare.server import Bench, Server, ask
from bench.pictures import Pictures
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

with open(os.environ["PEER_THREADS_FILE"], "w") as file:
    file.write("3")
# A child in a session of its own, that nobody waits for and that does not end when it is asked to.
ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", ignore], start_new_session=True)
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("starting", flush=True)
if "broken" in sys.argv:
    raise SystemExit("ValueError: no such model")
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["PEER_PORT"])), Answer).serve_forever()
"""

# A comparison in a process of its own.
SCRIPT = """
import sys
from pathlib import Path
from bench.compare.comparison import Load, run
from bench.compare.peers import Numbers, Peer, raw
from bench.compare.server import Bench
from bench.pictures import Pictures
from host import signals

here = Path(sys.argv[1])
peer = Peer("ours-tiny", "a fake", Numbers(1, 1, 0), raw("/p"), ("{python}", str(here / "server.py")))
with signals.as_exceptions():
    load = Load(Pictures("p", ("a",), (b"x",)), 1, 600)
    found = run([peer], Bench(here, "m", "fp32", 2, here, here), load, 1, print)
print("interrupted" if found["interrupted"] else "not", flush=True)
"""

MakePeer = Callable[..., Peer]


@pytest.fixture
def make_peer(tmp_path: Path) -> MakePeer:
    """A tiny server in this Python."""
    script = tmp_path / "server.py"
    script.write_text(SERVER)

    def make(name: str = "tiny", *words: str) -> Peer:
        return Peer(name, "a fake", Numbers(1, 2, 0), raw("/predict"), ("{python}", str(script), *words))

    return make


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "m.mar", "m", "bf16", 2, tmp_path, tmp_path / "config.properties")


def ended(processes: list[psutil.Process]) -> bool:
    """Wait until none of them lives; a zombie of another parent counts as ended."""
    _, alive = psutil.wait_procs(processes, timeout=10)
    return not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("words", [(), ("stubborn",)])
def test_a_peer_is_started_asked_weighed_and_stopped_with_its_children(
    make_peer: MakePeer, bench: Bench, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    if words:
        monkeypatch.setattr(server, "_GRACE", 0.5)
    with Server(make_peer("tiny", *words), bench) as started:
        started.wait(RED)
        assert [label for label, _ in ask(started.url, raw("/predict"), (RED,) * 5, 2)] == ["red"] * 5
        found = started.processes()
        assert len(found) == 2
        assert started.memory_mb() > 1
        assert started.threads() == 3
    assert ended(found)
    assert not started.scratch.exists()


def test_a_peer_that_ends_by_itself_says_why_and_leaves_nothing(make_peer: MakePeer, bench: Bench) -> None:
    with Server(make_peer("tiny", "broken"), bench) as started:
        with pytest.raises(BeelineError, match="tiny ended with exit code 1; its log says: ValueError: no such model"):
            started.wait(RED)
        found = started.processes()
        assert found, "its child lives on"
    assert ended(found)


def test_a_command_that_is_not_there_is_an_error_and_leaves_no_folder(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    with pytest.raises(BeelineError, match="/no/such/command does not start"):
        Server(Peer("gone", "a fake", Numbers(1, 1, 0), raw("/"), ("/no/such/command",)), bench)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_whole_comparison_of_two_names_of_the_same_server(make_peer: MakePeer, bench: Bench) -> None:
    pictures = Pictures("p", ("a.png",), (RED,))
    peers = [make_peer("one"), make_peer("two"), make_peer("ours-mine"), make_peer("ours-broken", "broken")]
    found = run(peers, bench, Load(pictures, 2, 0.5, [(RED, "red")]), 1, lambda line: None)
    one, two, mine, broken = found["rows"]
    for row in (one, two, mine):
        assert (row["error"], row["failed"], row["agreement"], row["threads"]) == (None, 0, 1.0, 3)
        assert row["per_second"][0] > 0
        assert row["memory_mb"] > 1
    assert (one["precision"], mine["precision"]) == ("fp32 TorchScript", "bf16")
    assert "no such model" in broken["error"]
    assert found["aa"]["server"] == "ours-mine"


def a_comparison(folder: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """Start one in a process of its own; return it and what it has started when its server runs."""
    (folder / "server.py").write_text(SERVER)
    script = folder / "compare.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(folder)]
    asked = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=clean(os.environ))
    deadline = time.monotonic() + 60
    while len(found := psutil.Process(asked.pid).children(recursive=True)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return asked, found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_comparison_that_is_asked_to_end_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    asked, found = a_comparison(tmp_path)
    try:
        asked.send_signal(number)
        said, _ = asked.communicate(timeout=60)
    finally:
        asked.kill()
        asked.wait()
    assert said.splitlines()[-1] == "interrupted"
    assert ended(found)


def test_what_a_killed_comparison_left_is_swept_by_the_next(tmp_path: Path) -> None:
    asked, found = a_comparison(tmp_path)
    scratch = Path(found[0].cwd())
    asked.kill()
    asked.communicate()
    assert {each.pid for each in found if each.is_running()} >= set(server.stop_leftovers())
    assert ended(found)
    assert not scratch.exists()
