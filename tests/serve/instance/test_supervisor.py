"""The supervisor leaves nothing behind, shown with a shell in Java's place and sleeps as workers."""

from __future__ import annotations

import functools
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
from host import processes
from serve import instance
from serve.instance import MARK, Instance, State, down, supervisor
from serve.status import status
from tests.serve.conftest import wait_until

ROOT = Path(__file__).resolve().parents[3]
# Two workers: a child, and one that left its parent, session and group, as MMS's do when their parent dies.
SERVER = "sleep 1000 & setsid sh -c 'sleep 1001 & exit 0'; wait"
# As workers do that are deep in a library: none of them hears a polite request.
STUBBORN = f"trap '' TERM; {SERVER}"
Start = Callable[..., tuple[Instance, subprocess.Popen[bytes], int]]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return (tmp_path / "state").resolve()


@pytest.fixture
def start(home: Path) -> Start:
    """Start a supervisor over a shell command, as `up` does; return instance, process and the pipe to it."""

    def begin(script: str = SERVER, name: str = "default") -> tuple[Instance, subprocess.Popen[bytes], int]:
        found = instance.named(home, name)
        lock = found.lock()
        assert lock is not None
        found.clear()
        mark = found.new_mark()
        scratch = instance.scratch(mark)
        scratch.mkdir()
        found.write(
            State(
                name=name,
                server="torchserve",
                mark=mark,
                inference="http://127.0.0.1:9",
                management="http://127.0.0.1:9",
                temporary=str(scratch),
                command=["sh", "-c", script],
                environment={},
                archives={},
                configuration={"models": [], "threads": {"value": 1, "reason": "test"}, "numbers": {}},
                started=time.time(),
                grace=1.0,
            )
        )
        read, write = os.pipe()
        with (found.logs / "supervisor.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "serve.instance.supervisor", str(found.folder), str(lock), str(read)],
                cwd=ROOT,
                stderr=log,
                pass_fds=(lock, read),
                start_new_session=True,
            )
        os.close(lock)
        os.close(read)
        return found, process, write

    return begin


def marked(found: Instance) -> list[psutil.Process]:
    return processes.marked(MARK, f"{found.folder}:")


def sleeping(found: Instance) -> bool:
    """Whether shell and both workers are there."""
    try:
        return sum("sleep" in process.name() for process in marked(found)) == 2
    except psutil.NoSuchProcess:
        # The shell that leaves the second worker ended meanwhile.
        return False


def assert_nothing_left(found: Instance, scratch: str) -> None:
    assert marked(found) == []
    assert not found.alive()
    assert found.read() is None
    assert not Path(scratch).exists()


@pytest.mark.parametrize("way", ["eof", "stop", "SIGTERM", "SIGINT", "SIGHUP"])
def test_it_stops_everything_however_it_is_asked(start: Start, way: str) -> None:
    found, process, pipe = start()
    wait_until(lambda: sleeping(found))
    state = found.read()
    assert state is not None
    assert state.supervisor == process.pid
    if way == "stop":
        os.write(pipe, supervisor.STOP)
    elif way != "eof":
        os.kill(process.pid, signal.Signals[way])
    if way == "eof":
        os.close(pipe)
    assert process.wait(timeout=30) == 0
    if way != "eof":
        os.close(pipe)
    assert_nothing_left(found, state.temporary)
    reason, failed = found.last_end() or ("", True)
    assert not failed
    assert ("ended" if way == "eof" else "as asked") in reason


def test_what_does_not_hear_is_killed(start: Start) -> None:
    found, process, pipe = start(STUBBORN)
    wait_until(lambda: sleeping(found))
    state = found.read()
    assert state is not None
    os.close(pipe)
    assert process.wait(timeout=30) == 0
    assert_nothing_left(found, state.temporary)


def test_java_ending_by_itself_is_a_failure_and_takes_the_workers_along(start: Start) -> None:
    found, process, pipe = start()
    wait_until(lambda: sleeping(found))
    state = found.read()
    assert state is not None
    assert state.java is not None
    os.kill(state.java, signal.SIGKILL)
    assert process.wait(timeout=30) == 1
    os.close(pipe)
    assert_nothing_left(found, state.temporary)
    assert found.last_end() == ("Java ended by itself (SIGKILL)", True)


def test_a_killed_supervisor_takes_java_along_and_the_next_command_its_orphans(start: Start, home: Path) -> None:
    found, process, pipe = start()
    wait_until(lambda: sleeping(found))
    state = found.read()
    assert state is not None
    assert state.java is not None
    process.kill()
    process.wait()
    os.close(pipe)
    java = state.java
    wait_until(lambda: not psutil.pid_exists(java))
    orphans = {each.pid for each in marked(found)}
    assert len(orphans) == 2
    assert list(down(home).values()) == [sorted(orphans)]
    assert_nothing_left(found, state.temporary)


def test_status_sweeps_too_and_says_how_it_ended(start: Start, home: Path) -> None:
    found, process, pipe = start()
    wait_until(lambda: sleeping(found))
    process.kill()
    process.wait()
    os.close(pipe)
    seen = status(home)
    assert len(seen["swept"]["default"]) >= 2
    assert marked(found) == []
    assert seen["ended"][0]["failed"]


def test_a_detached_one_outlives_its_starter_until_it_is_stopped(start: Start, home: Path) -> None:
    found, process, pipe = start()
    os.write(pipe, supervisor.READY + supervisor.DETACH)
    os.close(pipe)
    wait_until(lambda: sleeping(found))
    wait_until(lambda: bool((state := found.read()) and state.ready))
    state = found.read()
    assert state is not None
    assert process.poll() is None
    assert down(home) == {"default": []}
    process.wait(timeout=30)
    assert_nothing_left(found, state.temporary)


def test_only_marked_processes_are_stopped(start: Start, home: Path) -> None:
    with subprocess.Popen(["sleep", "1002"], env={**os.environ, MARK: f"{home / 'other'}:x"}) as bystander:
        try:
            found, process, pipe = start()
            wait_until(lambda: sleeping(found))
            os.close(pipe)
            process.wait(timeout=30)
            assert bystander.poll() is None
        finally:
            # Leaving the block waits for it.
            bystander.kill()


def test_down_needs_a_name_among_several_and_all_stops_them(start: Start, home: Path) -> None:
    started = [start(name=name) for name in ("one", "two")]
    for found, _, _ in started:
        wait_until(functools.partial(sleeping, found))
    with pytest.raises(BeelineError, match=r"2 servers are running \(one, two\); name one with --name"):
        down(home)
    with pytest.raises(BeelineError, match=r"no server named 'tow' is running; did you mean 'two'\?"):
        down(home, "tow")
    assert down(home, "one") == {"one": []}
    assert down(home, every=True) == {"two": []}
    for _, process, pipe in started:
        process.wait(timeout=30)
        os.close(pipe)


def test_down_without_a_server_says_so(home: Path) -> None:
    with pytest.raises(BeelineError, match="no server is running; start one with `beeline serve up`"):
        down(home)
