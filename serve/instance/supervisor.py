"""The small process above a server: it starts the server, adopts orphaned workers, and leaves nothing behind.

The launchers of TorchServe and MMS leave Java running on SIGTERM, and MMS leaves workers when Java dies. So this
process starts the server itself. It stops the whole tree on a signal, and when its pipe closes, because then the
command in the foreground has died. A server or a gateway that ends by itself is started again, and so is a server that
hangs. Run as `python -m serve.instance.supervisor FOLDER LOCK PIPE`; it inherits both descriptors.
"""

from __future__ import annotations

import ctypes
import dataclasses
import http.client
import json
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import psutil

from beeline.errors import BeelineError
from beeline.metrics import FOLDER, identity
from host import processes
from serve.instance import MARK, Instance, State, link, remove_scratch

READY, DETACH, STOP = b"ready\n", b"detach\n", b"stop\n"
# Seconds until a process that ended is started again: doubled each time, until it has run for the longest pause. A
# server that ends more often than `_LIMIT` times before it has run so long is given up, after three minutes or more.
_PAUSE, _LONGEST_PAUSE, _LIMIT = 1.0, 30.0, 10
# A server hangs that leaves so many questions in a row without an answer, each for a sixth of `State.silence` seconds;
# one that has just started may unpack archives, so it gets ten times as many.
_QUESTIONS = 6
# Seconds between two looks at the folder, and until all its files are touched again.
_KEEP, _DAY = 2.0, 86_400.0
# Seconds without a living worker after which a model is started again, if the server is patient.
_DEAD = 2.0
_PR_SET_CHILD_SUBREAPER = 36
logger = logging.getLogger("supervisor")


@dataclass
class Child:
    """A process to which the kernel sends `end` when this one ends; `ends` counts its own in a row."""

    name: str
    command: Sequence[str]
    end: signal.Signals
    pid: int | None = None
    begun: float = 0.0
    pause: float = _PAUSE / 2
    due: float | None = None
    ends: int = 0


class Supervisor:
    """Runs one instance, from the start of its server until nothing of it is left."""

    def __init__(self, instance: Instance, state: State, pipe: int) -> None:
        self.instance = instance
        self.state = dataclasses.replace(state, supervisor=os.getpid())
        self.pipe: int | None = pipe
        self.exits: dict[int, int] = {}
        self.reason: str | None = None
        self.failed = False
        self.server = Child("server", state.command, signal.SIGKILL)
        self.gateway = Child("gateway", state.gateway, signal.SIGTERM)
        # Questions in a row without an answer; below zero after a start.
        self.silent = 0
        # When the folder is looked at next, when its files are touched, and processes at work in a removed folder.
        self._look, self._touch, self._homeless = 0.0, 0.0, set[int]()
        # It needs modules that this process does not hold.
        command = [sys.executable, "-m", "serve.scale", str(instance.folder)]
        self.restorer = Child("start of workers", command, signal.SIGTERM)
        # By MODEL/VERSION, when it was last seen with a living worker.
        self._served: dict[str, float] = {}

    def run(self) -> int:
        """Supervise until the end; return the exit code, 1 if the server or the gateway ended by itself."""
        wake, alarm = os.pipe()
        os.set_blocking(alarm, False)
        signal.set_wakeup_fd(alarm)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._asked)
        # SIGCHLD must have a handler to wake the loop.
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        # Orphans (MMS's forked workers, a dead worker's children) become children of this process.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.instance.write(self.state)
        try:
            self._begin(self.server)
            if self.state.gateway:
                self._begin(self.gateway)
            threading.Thread(target=self._ask, name="ask", daemon=True).start()
            while self.reason is None:
                watched = [wake] + ([self.pipe] if self.pipe is not None else [])
                readable, _, _ = select.select(watched, [], [], 1.0)
                if wake in readable:
                    os.read(wake, 4096)
                if self.pipe in readable:
                    self._listen()
                self._reap()
                for child in (self.server, self.gateway, self.restorer):
                    self._watch(child)
                if self.silent >= _QUESTIONS and self.state.ready:
                    self._kill(f"the server has not answered for {self.state.silence:g} s")
                self._keep_folder()
                self._revive()
            # The gateway first, so that requests under way still get their answers.
            for child in (self.gateway, self.server):
                if child.pid is not None:
                    self._stop(child.pid)
        except BeelineError as error:
            self._fail(str(error))
        except Exception as error:
            self._fail(f"the supervisor failed ({type(error).__name__}: {error})")
            raise
        finally:
            processes.stop_marked(MARK, self.state.mark, self.state.grace / 2, Path(self.state.temporary))
            remove_scratch(Path(self.state.temporary), Path(self.state.short))
            self.instance.end(self.reason or "its supervisor ended", self.failed)
        return 1 if self.failed else 0

    def _fail(self, reason: str) -> None:
        self.reason, self.failed = reason, True

    def _save(self, **changes: Any) -> None:
        self.state = dataclasses.replace(self.state, **changes)
        self.instance.write(self.state)

    def _begin(self, child: Child) -> None:
        """Start a child; the server logs to console.log, the others to supervisor.log. One that cannot start ended."""
        is_server, child.begun, child.due = child is self.server, time.monotonic(), None
        try:
            with (self.instance.logs / "console.log").open("ab") as console:
                process = subprocess.Popen(
                    child.command,
                    env={**os.environ, **(self.state.environment if is_server else {}), MARK: self.state.mark},
                    cwd=self.state.temporary,
                    stdin=subprocess.DEVNULL,
                    stdout=console if is_server else None,
                    stderr=console if is_server else None,
                    preexec_fn=processes.ending_with_parent(child.end),
                )
        except (OSError, subprocess.SubprocessError) as error:
            self._ended(child, f"the {child.name} cannot be started ({error})")
            return
        process.returncode = 0  # `_reap` collects it; Popen must not warn that nobody did.
        child.pid = process.pid
        # An adopted process that ended may have had the same id.
        self.exits.pop(child.pid, None)
        if child is not self.restorer:
            self._save(**{f"{child.name}_process": child.pid})
        if is_server:
            self.silent = -10 * _QUESTIONS
            # Until it is ready `up` gives it its workers.
            self.restorer.due = child.begun if self.state.ready and self.state.archives else None

    def _watch(self, child: Child) -> None:
        """Start a child that is due, and see whether it ended."""
        if child.pid is None and child.due is not None and time.monotonic() >= child.due:
            self._begin(child)
        if self.reason is not None or child.pid not in self.exits or child.pid is None:
            return
        code = self.exits.pop(child.pid)
        if child is self.restorer and code == 0:
            child.pid, child.pause = None, _PAUSE / 2
            return
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self._ended(child, f"the {child.name} ended by itself ({reason})")

    def _ended(self, child: Child, ended: str) -> None:
        """Let a child start again; its end is a failure before the server was ready, or too often."""
        has_run = child is not self.restorer and time.monotonic() - child.begun > _LONGEST_PAUSE
        child.ends = 1 if has_run else child.ends + 1
        if not self.state.ready or (child is self.server and child.ends > _LIMIT):
            self._fail(ended if child.ends == 1 else f"{ended}, {child.ends} times in a row")
            return
        child.pause = _PAUSE if has_run else min(2 * child.pause, _LONGEST_PAUSE)
        logger.error("%s; starting it again in %g s", ended, child.pause)
        child.pid, child.due = None, time.monotonic() + child.pause
        if child is self.server:
            # Multi Model Server's workers outlive it; both servers in Java unpack their archives again.
            self._stop_workers()
            self.restorer.pid = self.restorer.due = None
            shutil.rmtree(Path(self.state.temporary) / "models", ignore_errors=True)

    def _stop_workers(self) -> None:
        """Stop all processes except the gateway and those that it has started."""
        spared: set[int] = set()
        with suppress(psutil.Error):
            if self.gateway.pid is not None:
                gateway = psutil.Process(self.gateway.pid)
                spared = {each.pid for each in (gateway, *gateway.children(recursive=True))}
        processes.stop_marked(MARK, self.state.mark, _PAUSE / 2, spared=spared)

    def _ask(self) -> None:
        """Ask the server's management for its models, again and again, and count what it does not answer."""
        at, seconds = urlsplit(self.state.management), self.state.silence / _QUESTIONS
        while True:
            begun = time.monotonic()
            try:
                with closing(http.client.HTTPConnection(str(at.hostname), at.port, timeout=seconds)) as connection:
                    connection.request("GET", "/models")
                    connection.getresponse().read()
                self.silent = 0
            except (OSError, http.client.HTTPException):
                self.silent += 1
            time.sleep(max(0.0, begun + seconds - time.monotonic()))

    def _kill(self, why: str) -> None:
        """Kill the server, so that it is started again."""
        self.silent = -10 * _QUESTIONS
        if self.server.pid is not None:
            logger.error("%s; it is killed", why)
            with suppress(ProcessLookupError):
                os.kill(self.server.pid, signal.SIGKILL)

    def _keep_folder(self) -> None:
        """Keep what a system removes from /tmp when it is old; start the server again where its archives are gone."""
        now, folder, short = time.monotonic(), Path(self.state.temporary), Path(self.state.short)
        if now < self._look or self.reason is not None:
            return
        self._look = now + _KEEP
        if not folder.is_dir():
            self._fail(f"its folder {folder} was removed; start it again")
            return
        link(short, folder)
        for path in (short, *short.rglob("*")) if now > self._touch else ():
            self._touch = now + _DAY
            with suppress(OSError):
                os.utime(path, follow_symlinks=False)
        homeless, self._homeless = self._homeless, set()
        with suppress(psutil.Error, OSError):
            for child in psutil.Process(self.server.pid).children(recursive=True) if self.server.pid else ():
                if Path(f"/proc/{child.pid}/cwd").readlink().name.endswith(" (deleted)"):
                    self._homeless.add(child.pid)
        # Twice, because a worker that is just ending may have lost its folder.
        if homeless & self._homeless:
            self._kill("the server's unpacked archives were removed")

    def _revive(self) -> None:
        """Start a model again whose workers are all dead, where the server would wait ever longer before it does."""
        if not (self.state.revive and self.state.ready and self.server.pid is not None):
            self._served.clear()
            return
        now = time.monotonic()
        for path in Path(self.state.environment[FOLDER]).glob("[0-9]*-*.json"):
            with suppress(OSError, ValueError, KeyError):
                if identity(int(path.stem.partition("-")[0])) == path.stem:
                    values = json.loads(path.read_text(encoding="utf-8"))
                    self._served[f"{values['model']}/{values['version']}"] = now
        for name in [name for name, seen in self._served.items() if now - seen > _DEAD]:
            logger.error("%s has no living worker; it is started again, unless it was scaled to none", name)
            # It is looked for again once a worker has loaded; until then the process tries again.
            del self._served[name]
            self.restorer.due = self.restorer.due or now

    def _listen(self) -> None:
        """Read what the command in the foreground says; when it ends without having detached, stop."""
        assert self.pipe is not None
        commands = os.read(self.pipe, 4096)
        if READY in commands:
            self._save(ready=True)
        if DETACH in commands:
            os.close(self.pipe)
            self.pipe = None
        elif STOP in commands:
            self.reason = "stopped as asked"
        elif not commands:
            self.reason = "the command that started it ended"

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                self.exits[ended[0]] = os.waitstatus_to_exitcode(ended[1])

    def _stop(self, process: int) -> None:
        """End a child and wait for it. A server must end before its workers, or it would start new ones."""
        number = signal.SIGTERM
        deadline = time.monotonic() + self.state.grace
        while process not in self.exits:
            try:
                os.kill(process, number)
            except ProcessLookupError:
                return
            while process not in self.exits and time.monotonic() < deadline:
                time.sleep(0.05)
                self._reap()
            number, deadline = signal.SIGKILL, deadline + self.state.grace

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or f"stopped as asked ({signal.Signals(number).name})"


def main(arguments: list[str]) -> int:
    """Run the supervisor of the instance in the folder that is the first argument."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stdout)
    instance = Instance(Path(arguments[0]))
    state = instance.read()
    if state is None:
        raise SystemExit(f"{instance.folder} has no state to start from")
    return Supervisor(instance, state, int(arguments[2])).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
