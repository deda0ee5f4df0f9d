"""The supervisor leaves nothing behind, shown with a shell as Java and sleeping processes as workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from beeline.errors import BeelineError
from host import processes
from serve import instance
from serve.instance import MARK, State, down, supervisor
from serve.status import status
from tests.conftest import ROOT
from tests.serve.conftest import wait_for

# Two workers: a child, and one that left its parent, session and group, as MMS's do when their parent dies.
SERVER = "sleep 1000 & setsid sh -c 'sleep 1001 & exit 0'; wait"


class Started:
    """A supervisor over a shell command, started as `up` does, once both workers run."""

    def __init__(self, home: Path, name: str, script: str) -> None:
        self.instance = instance.named(home, name)
        lock = self.instance.lock()
        assert lock is not None
        self.instance.clear()
        mark = self.instance.new_mark()
        self.scratch = instance.scratch(mark)
        self.scratch.mkdir()
        state = State(
            name=name,
            server="torchserve",
            mark=mark,
            inference="http://127.0.0.1:9",
            management="http://127.0.0.1:9",
            temporary=str(self.scratch),
            command=["sh", "-c", script],
            environment={},
            archives={},
            configuration={"models": [], "threads": {"value": 1, "reason": "test"}, "numbers": {}},
            started=time.time(),
            grace=1.0,
        )
        self.instance.write(state)
        read, self.pipe = os.pipe()
        command = [sys.executable, "-m", "serve.instance.supervisor", str(self.instance.folder), str(lock), str(read)]
        with (self.instance.logs / "supervisor.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stderr=log, pass_fds=(lock, read), start_new_session=True
            )
        os.close(lock)
        os.close(read)
        wait_for(lambda: len(self.sleeping()) == 2)
        running = self.instance.read()
        assert running is not None
        assert running.supervisor == self.process.pid
        assert running.server_process is not None
        self.server_process = running.server_process

    def marked(self) -> list[psutil.Process]:
        return processes.marked(MARK, f"{self.instance.folder}:")

    def sleeping(self) -> list[psutil.Process]:
        # The shell that leaves the second worker may end meanwhile.
        with suppress(psutil.NoSuchProcess):
            return [process for process in self.marked() if "sleep" in process.name()]
        return []

    def hang_up(self) -> None:
        os.close(self.pipe)
        self.pipe = -1

    def ended(self) -> tuple[int, tuple[str, bool] | None]:
        """Wait for the end, check that nothing is left, and return exit code and reason."""
        code = self.process.wait(timeout=30)
        if self.pipe >= 0:
            self.hang_up()
        assert self.marked() == []
        assert not self.instance.alive()
        assert self.instance.read() is None
        assert not self.scratch.exists()
        return code, self.instance.last_end()


Start = Callable[..., Started]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return (tmp_path / "state").resolve()


@pytest.fixture
def start(home: Path) -> Start:
    return lambda name="default", script=SERVER: Started(home, name, script)


@pytest.mark.parametrize("way", ["eof", "stop", "SIGTERM", "SIGINT", "SIGHUP"])
def test_it_stops_everything_however_it_is_asked(start: Start, way: str) -> None:
    started = start()
    if way == "eof":
        started.hang_up()
    elif way == "stop":
        os.write(started.pipe, supervisor.STOP)
    else:
        os.kill(started.process.pid, signal.Signals[way])
    reason = {"eof": "the command that started it ended", "stop": "stopped as asked"}
    assert started.ended() == (0, (reason.get(way, f"stopped as asked ({way})"), False))


def test_processes_that_ignore_sigterm_are_killed_and_those_of_others_live(start: Start) -> None:
    """Workers ignore it when they are deep in a library."""
    bystander = subprocess.Popen(["sleep", "1002"], env={**os.environ, MARK: "/other:x"})
    try:
        started = start(script=f"trap '' TERM; {SERVER}")
        started.hang_up()
        assert started.ended()[0] == 0
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_java_ending_by_itself_is_a_failure_and_ends_the_workers(start: Start) -> None:
    started = start()
    os.kill(started.server_process, signal.SIGKILL)
    assert started.ended() == (1, ("the server ended by itself (SIGKILL)", True))


@pytest.mark.parametrize("command", ["down", "status"])
def test_a_killed_supervisor_ends_java_and_the_next_command_stops_its_orphans(
    start: Start, home: Path, command: str
) -> None:
    started = start()
    started.process.kill()
    started.process.wait()
    wait_for(lambda: not psutil.pid_exists(started.server_process))
    orphans = sorted(process.pid for process in started.marked())
    assert len(orphans) == 2
    seen = {"swept": down(home)} if command == "down" else status(home)
    assert seen["swept"] == {"default": orphans}
    reason = "its supervisor was killed; the processes that it left are stopped now"
    assert started.ended()[1] == (reason, True)
    if command == "status":
        assert seen["ended"] == [{"name": "default", "reason": reason, "failed": True}]


def test_a_detached_one_outlives_its_starter_until_it_is_stopped(start: Start, home: Path) -> None:
    started = start()
    os.write(started.pipe, supervisor.READY + supervisor.DETACH)
    started.hang_up()
    wait_for(lambda: bool((state := started.instance.read()) and state.ready))
    assert started.process.poll() is None
    assert down(home) == {"default": []}
    started.ended()


def test_down_needs_a_name_among_several_and_all_stops_them(start: Start, home: Path) -> None:
    with pytest.raises(BeelineError, match="no server is running; start one with `beeline serve up`"):
        down(home)
    both = [start(name) for name in ("one", "two")]
    with pytest.raises(BeelineError, match=r"2 servers are running \(one, two\); name one with --name"):
        down(home)
    with pytest.raises(BeelineError, match=r"no server named 'tow' is running; did you mean 'two'\?"):
        down(home, "tow")
    assert down(home, "one") == {"one": []}
    assert down(home, every=True) == {"two": []}
    for started in both:
        started.ended()
