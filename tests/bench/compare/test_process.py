"""A peer's processes on this machine: started, asked, weighed, stopped with all they started."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from beeline.errors import BeelineError
from bench.compare import process
from bench.compare.comparison import run
from bench.compare.environment import Environment
from bench.compare.peer import DOCUMENTED, OURS, Bench, Numbers, labels, memory_mb, wait
from bench.compare.process import Place, Process
from bench.compare.turn import Check, Load, take
from bench.compare.wire import raw
from bench.pictures import Pictures
from serve.servers.protocol import clean
from tests.conftest import RED

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

MakePeer = Callable[..., Process]


@pytest.fixture
def make_peer(tmp_path: Path) -> MakePeer:
    """A tiny server of a fake peer, in this Python."""
    folder = tmp_path / "peers" / "tiny"
    folder.mkdir(parents=True)
    (folder / "server.py").write_text(SERVER)

    class Here(Environment):
        """This environment; nothing is installed."""

        @property
        def python(self) -> Path:
            return Path(sys.executable)

        def prepare(self, say: Callable[[str], None]) -> Path:
            return self.python

    def make(name: str = "tiny", kind: str = DOCUMENTED, *words: str) -> Process:
        def command(place: Place, numbers: Numbers, bench: Bench) -> list[str]:
            return [str(place.python), str(place.folder / "server.py"), *words]

        environment = Here("tiny", tmp_path, folder.parent)
        return Process(
            name, kind, "a fake", Numbers(1, 2, 0), raw("/predict"), environment, command, folder=folder.parent
        )

    return make


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "m.mar", "m", "bf16", 2, tmp_path, tmp_path / "config.properties")


def ended(processes: list[psutil.Process]) -> bool:
    """Wait until none of them lives; a zombie of another parent counts as ended."""
    _, alive = psutil.wait_procs(processes, timeout=10)
    return not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.bench
def test_a_peer_is_started_asked_weighed_and_stopped_with_its_children(make_peer: MakePeer, bench: Bench) -> None:
    peer = make_peer()
    with peer.start(bench) as started:
        url = started.url + peer.wire.path
        wait(started, url, peer, RED)
        assert labels(url, peer.wire, (RED,) * 5, 2) == ["red"] * 5
        found = started.processes()
        assert len(found) == 2
        assert memory_mb(found) > 1
        assert started.threads() == 3
        scratch = started.scratch
    assert ended(found)
    assert not scratch.exists()


@pytest.mark.bench
def test_a_peer_that_does_not_end_when_asked_is_ended(
    make_peer: MakePeer, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_GRACE", 0.5)
    peer = make_peer("tiny", DOCUMENTED, "stubborn")
    with peer.start(bench) as started:
        wait(started, started.url + peer.wire.path, peer, RED)
        found = started.processes()
    assert ended(found)


@pytest.mark.bench
def test_a_peer_that_ends_by_itself_says_why_and_leaves_nothing(make_peer: MakePeer, bench: Bench) -> None:
    peer = make_peer("tiny", DOCUMENTED, "broken")
    with peer.start(bench) as started:
        with pytest.raises(BeelineError, match="tiny ended with exit code 1; its log says: ValueError: no such model"):
            wait(started, started.url + peer.wire.path, peer, RED)
        found = started.processes()
        assert found, "its child lives on"
    assert ended(found)


@pytest.mark.bench
def test_a_command_that_is_not_there_is_an_error_and_leaves_no_folder(make_peer: MakePeer, bench: Bench) -> None:
    peer = make_peer()
    missing = Process(
        *(peer.name, peer.kind, peer.pattern, peer.numbers, peer.wire, peer.environment),
        lambda place, numbers, bench: ["/no/such/command"],
    )
    with pytest.raises(BeelineError, match="/no/such/command does not start"):
        missing.start(bench)


@pytest.mark.bench
def test_a_whole_comparison_of_two_names_of_the_same_server(make_peer: MakePeer, bench: Bench) -> None:
    pictures = Pictures("p", ("a.png",), (RED,))
    peers = [make_peer("one"), make_peer("two"), make_peer("mine", OURS), make_peer("broken", OURS, "broken")]
    found = run(peers, bench, Load(pictures, 2, 0.5), 1, Check(pictures, ("red",)), lambda line: None, take)
    one, two, mine, broken = found["rows"]
    for row in (one, two, mine):
        assert row["error"] is None
        assert row["failed"] == 0
        assert row["agreement"] == 1.0
        assert row["per_second"][0] > 0
        assert row["threads"] == 3
        assert row["memory_mb"] > 1
    assert mine["precision"] == "bf16"
    assert "no such model" in broken["error"]
    assert found["aa"]["server"] == "mine"


SCRIPT = """
import sys
from pathlib import Path
from bench.compare.comparison import run
from bench.compare.environment import Environment
from bench.compare.peer import OURS, Bench, Numbers
from bench.compare.process import Process
from bench.compare.turn import Load
from bench.compare.wire import raw
from bench.pictures import Pictures
from host import signals

class Here(Environment):
    python = Path(sys.executable)

    def prepare(self, say):
        return self.python

here = Path(sys.argv[1])
peers = here / "peers"
peer = Process("tiny", OURS, "a fake", Numbers(1, 1, 0), raw("/p"), Here("tiny", here, peers),
               lambda place, numbers, bench: [str(place.python), str(place.folder / "server.py")], folder=peers)
bench = Bench(here, "m", "fp32", 2, here, here)
with signals.as_exceptions():
    found = run([peer], bench, Load(Pictures("p", ("a",), (b"x",)), 1, 600), 1, None, print)
print("interrupted" if found["interrupted"] else "not", flush=True)
"""


def a_comparison(folder: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """Start one in a process of its own; return it and what it has started when its server runs."""
    peers = folder / "peers" / "tiny"
    peers.mkdir(parents=True)
    (peers / "server.py").write_text(SERVER)
    script = folder / "compare.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(folder)]
    asked = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=clean(os.environ))
    deadline = time.monotonic() + 60
    while len(found := psutil.Process(asked.pid).children(recursive=True)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return asked, found


@pytest.mark.bench
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


@pytest.mark.bench
def test_what_a_killed_comparison_left_is_swept_by_the_next(tmp_path: Path) -> None:
    asked, found = a_comparison(tmp_path)
    scratch = Path(found[0].cwd())
    asked.kill()
    asked.communicate()
    assert {each.pid for each in found if each.is_running()} >= set(process.sweep())
    assert ended(found)
    assert not scratch.exists()
