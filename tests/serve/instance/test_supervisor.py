"""The supervisor leaves nothing behind, shown with a shell as Java and sleeping processes as workers."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from beeline.errors import BeelineError
from beeline.metrics import FOLDER, identity
from host import processes
from serve import instance
from serve.instance import MARK, State, down, supervisor
from serve.ports import Address, settle
from serve.status import status
from tests.conftest import ROOT
from tests.serve.conftest import wait_for

# Two workers: a child, and one that left its parent, session and group, as MMS's do when their parent dies.
SERVER = "sleep 1000 & setsid sh -c 'sleep 1001 & exit 0'; wait"

EMPTY = State(
    name="default",
    server="torchserve",
    mark="/nobody:0",
    inference="http://127.0.0.1:9",
    management="http://127.0.0.1:9",
    temporary="",
    short="",
    command=[],
    environment={},
    archives={},
    configuration={"models": [], "threads": {"value": 1, "reason": "test"}, "numbers": {}},
    started=0.0,
    grace=1.0,
)


class Started:
    """A supervisor over a shell command, started as `up` does, once both workers run."""

    def __init__(self, home: Path, name: str, script: str, **values: Any) -> None:
        self.instance = instance.named(home, name)
        lock = self.instance.lock()
        assert lock is not None
        self.instance.clear()
        mark = self.instance.new_mark()
        self.scratch, self.short = self.instance.folder / "beeline-test", instance.short_path(mark)
        self.scratch.mkdir()
        instance.link(self.short, self.scratch)
        command = ["sh", "-c", script]
        state = dataclasses.replace(
            EMPTY,
            name=name,
            mark=mark,
            temporary=str(self.scratch),
            short=str(self.short),
            command=command,
            started=time.time(),
            **values,
        )
        self.instance.write(state)
        read, self.pipe = os.pipe()
        command = [sys.executable, "-m", "serve.instance.supervisor", str(self.instance.folder), str(lock), str(read)]
        with (self.instance.logs / "supervisor.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, pass_fds=(lock, read), start_new_session=True
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

    def state(self) -> State:
        state = self.instance.read()
        assert state is not None
        return state

    def ready(self) -> None:
        os.write(self.pipe, supervisor.READY)
        wait_for(lambda: self.state().ready)

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
        assert not self.short.is_symlink()
        return code, self.instance.last_end()


def answers(address: Address) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex((address.host, address.port)) == 0


Start = Callable[..., Started]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return (tmp_path / "state").resolve()


@pytest.fixture
def start(home: Path) -> Start:
    return lambda name="default", script=SERVER, **values: Started(home, name, script, **values)


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


def test_java_ending_before_it_was_ready_is_a_failure_and_ends_the_workers(start: Start) -> None:
    started = start()
    os.kill(started.server_process, signal.SIGKILL)
    assert started.ended() == (1, ("the server ended by itself (SIGKILL)", True))


def test_java_that_ends_later_starts_again_without_its_old_workers(start: Start) -> None:
    started = start()
    old = {process.pid for process in started.sleeping()}
    started.ready()
    os.kill(started.server_process, signal.SIGKILL)
    new = wait_for(started.sleeping, lambda found: len(found) == 2 and not old & {process.pid for process in found})
    assert len(new) == 2
    state = wait_for(started.state, lambda state: state.server_process != started.server_process)
    assert state.server_process is not None
    log = (started.instance.logs / "supervisor.log").read_text()
    assert "the server ended by itself (SIGKILL); starting it again in 1 s" in log
    started.hang_up()
    assert started.ended()[0] == 0


def test_java_that_ends_at_once_each_time_is_given_up_after_a_stated_number(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_LIMIT", 3)
    command = ["sh", "-c", f"echo start >> {tmp_path / 'starts'}"]
    state = dataclasses.replace(
        EMPTY, temporary=str(tmp_path), short=str(tmp_path), command=command, ready=True, mark=f"{tmp_path}:1"
    )
    home = instance.named(tmp_path, "limit")
    home.clear()
    read, write = os.pipe()
    one = supervisor.Supervisor(home, state, read)
    one.server.pause = 0.01
    one._begin(one.server)
    while one.reason is None:
        one._reap()
        one._watch(one.server)
        time.sleep(0.01)
    os.close(read)
    os.close(write)
    assert one.reason == "the server ended by itself (exit code 0), 4 times in a row"
    assert (tmp_path / "starts").read_text().count("start") == 4


def test_java_that_hangs_is_killed_after_the_stated_time_and_starts_again(start: Start) -> None:
    (address,) = settle([(Address("127.0.0.1", 0), "")])
    web = f"{sys.executable} -m http.server --bind 127.0.0.1 {address.port}"
    # It answers 404, which is an answer.
    started = start(script=f"sleep 1000 & sleep 1001 & exec {web}", management=str(address), silence=1.2)
    wait_for(lambda: answers(address))
    started.ready()
    os.kill(started.server_process, signal.SIGSTOP)
    wait_for(started.state, lambda state: state.server_process != started.server_process)
    assert (
        "the server has not answered for 1.2 s; it is killed" in (started.instance.logs / "supervisor.log").read_text()
    )
    started.hang_up()
    assert started.ended()[0] == 0


def test_the_short_path_is_made_again(start: Start) -> None:
    started = start()
    started.short.unlink()
    wait_for(started.short.is_symlink)
    assert started.short.resolve() == started.scratch
    started.hang_up()
    assert started.ended()[0] == 0


def test_java_starts_again_where_the_unpacked_archives_were_removed(start: Start) -> None:
    """As after ten days on a system that cleans /tmp: no worker could start, and every prediction would be an error."""
    started = start(script=f"mkdir -p models; cd models; {SERVER}")
    started.ready()
    shutil.rmtree(started.scratch / "models")
    wait_for(started.state, lambda state: state.server_process != started.server_process)
    wait_for((started.scratch / "models").is_dir)
    assert "unpacked archives were removed; it is killed" in (started.instance.logs / "supervisor.log").read_text()
    started.hang_up()
    assert started.ended()[0] == 0


def test_a_model_without_living_workers_is_started_again_where_the_server_is_patient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = subprocess.Popen(["sleep", "1000"])
    name = identity(worker.pid)
    (tmp_path / f"{name}.json").write_text(json.dumps({"model": "fake", "version": "1.0"}))
    values: dict[str, Any] = {
        "temporary": str(tmp_path),
        "ready": True,
        "revive": True,
        "environment": {FOLDER: str(tmp_path)},
    }
    one = supervisor.Supervisor(instance.named(tmp_path, "patient"), dataclasses.replace(EMPTY, **values), 0)
    one.instance.clear()
    one.server.pid = worker.pid
    ends, moments = iter([1, 0]), list[float]()

    def begin(child: supervisor.Child) -> None:
        """A fake: what gives models their workers fails at once, and succeeds the second time."""
        assert child.command[2:] == ["serve.scale", str(tmp_path / "patient")]
        child.begun, child.due, child.pid = time.monotonic(), None, 4711
        moments.append(child.begun)
        one.exits[4711] = next(ends)

    monkeypatch.setattr(one, "_begin", begin)
    monkeypatch.setattr(supervisor, "_DEAD", 0.1)
    one._revive()
    assert one._served.keys() == {"fake/1.0"}
    worker.kill()
    worker.wait()
    time.sleep(0.2)
    one.restorer.pause = 0.05
    for _ in range(20):
        one._revive()
        one._watch(one.restorer)
        time.sleep(0.02)
    assert len(moments) == 2
    # It is done, since no worker of this model has loaded since then.
    assert (one.restorer.pid, one.restorer.due, one.restorer.pause, one.reason) == (None, None, 0.5, None)


def test_java_that_cannot_be_started_is_tried_again(tmp_path: Path) -> None:
    """As when there are no more processes or files to have."""
    values: dict[str, Any] = {"temporary": str(tmp_path), "ready": True, "mark": f"{tmp_path}:1"}
    state = dataclasses.replace(EMPTY, command=[str(tmp_path / "java")], **values)
    one = supervisor.Supervisor(instance.named(tmp_path, "absent"), state, 0)
    one.instance.clear()
    one.server.pause = 0.01
    one._begin(one.server)
    assert (one.server.pid, one.server.ends, one.reason) == (None, 1, None)
    shutil.copy("/bin/true", tmp_path / "java")
    # The process id that it will have may be that of an orphan that has ended.
    one.exits = dict.fromkeys(range(2**22), 0)
    time.sleep(0.05)
    one._watch(one.server)
    assert one.server.pid is not None
    assert one.server.pid not in one.exits
    assert os.waitpid(one.server.pid, 0) == (one.server.pid, 0)


def test_what_another_put_at_the_short_path_is_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short, scratch = tmp_path / "beeline-1", tmp_path / "own"
    instance.link(short, scratch)
    instance.link(short, scratch)
    monkeypatch.setattr(os, "geteuid", lambda: short.lstat().st_uid + 1)
    with pytest.raises(BeelineError, match=r"beeline-1 is not this server's link to .*own; remove it"):
        instance.link(short, scratch)
    monkeypatch.undo()
    with pytest.raises(BeelineError, match="is not this server's link"):
        instance.link(short, tmp_path / "other")
    short.unlink()
    short.mkdir()
    with pytest.raises(BeelineError, match="is not this server's link"):
        instance.link(short, scratch)


def test_the_lock_of_scaling_is_the_servers_users_at_each_start(tmp_path: Path) -> None:
    """Where root was the first to scale, the supervisor could not."""
    one = instance.named(tmp_path, "locked")
    one.clear()
    one.scale_lock.chmod(0)
    one.clear()
    assert one.scale_lock.stat().st_mode & 0o600 == 0o600


def test_a_removed_folder_ends_in_one_sentence(start: Start) -> None:
    started = start()
    shutil.rmtree(started.scratch)
    reason = f"its folder {started.scratch} was removed; start it again"
    assert started.ended() == (1, (reason, True))


def test_a_servers_files_are_in_its_instances_folder_where_nginx_may_enter_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", f"/tmp/{'long' * 40}")
    folder = tmp_path / "one"
    folder.mkdir()
    assert instance.short_path(f"{folder}:abc") == Path("/tmp/beeline-abc")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert instance.scratch(f"{folder}:abc") == folder / "beeline-abc"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    folder.chmod(0o700)
    assert instance.scratch(f"{folder}:abc") == Path("/tmp/beeline-abc")


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
