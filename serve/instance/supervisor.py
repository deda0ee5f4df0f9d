"""The small process above a server: it starts the server, adopts orphaned workers, and leaves nothing behind.

The launchers of TorchServe and MMS leave Java running on SIGTERM, and MMS leaves workers when Java dies. So this
process starts the server itself. It stops the whole tree on a signal, and when its pipe closes, because then the
command in the foreground has died. Run as `python -m serve.instance.supervisor FOLDER LOCK PIPE`; it
inherits both descriptors.
"""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

from host import processes
from serve.instance import MARK, Instance, State, remove_scratch

READY, DETACH, STOP = b"ready\n", b"detach\n", b"stop\n"
# Seconds until a gateway that ended is started again: doubled each time, until it has run for the longest pause.
_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
_PR_SET_CHILD_SUBREAPER = 36
logger = logging.getLogger("supervisor")


class Supervisor:
    """Runs one instance, from the start of its server until nothing of it is left."""

    def __init__(self, instance: Instance, state: State, pipe: int) -> None:
        self.instance = instance
        self.state = dataclasses.replace(state, supervisor=os.getpid())
        self.pipe: int | None = pipe
        self.exits: dict[int, int] = {}
        self.reason: str | None = None
        self.failed = False
        self.gateway: int | None = None
        self._begun, self._pause = 0.0, _PAUSE / 2
        self._due: float | None = None

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
            with (self.instance.logs / "console.log").open("ab") as console:
                server = self._start(self.state.command, signal.SIGKILL, console, self.state.environment)
            self._save(server_process=server)
            if self.state.gateway:
                self._start_gateway()
            while self.reason is None:
                watched = [wake] + ([self.pipe] if self.pipe is not None else [])
                readable, _, _ = select.select(watched, [], [], 1.0)
                if wake in readable:
                    os.read(wake, 4096)
                if self.pipe in readable:
                    self._listen()
                self._reap()
                if self.reason is None and server in self.exits:
                    self._fail(f"the server ended by itself ({_exit(self.exits[server])})")
                self._watch_gateway()
            # The gateway first, so that requests under way still get their answers.
            if self.gateway is not None:
                self._stop(self.gateway)
            self._stop(server)
        except Exception as error:
            self._fail(f"the supervisor failed ({type(error).__name__}: {error})")
            raise
        finally:
            processes.stop_marked(MARK, self.state.mark, self.state.grace / 2, Path(self.state.temporary))
            remove_scratch(Path(self.state.temporary))
            self.instance.end(self.reason or "its supervisor ended", self.failed)
        return 1 if self.failed else 0

    def _fail(self, reason: str) -> None:
        self.reason, self.failed = reason, True

    def _save(self, **changes: Any) -> None:
        self.state = dataclasses.replace(self.state, **changes)
        self.instance.write(self.state)

    def _start(
        self, command: list[str], end: signal.Signals, out: IO[bytes] | None = None, environment: Mapping[str, str] = {}
    ) -> int:
        """Start a child to which the kernel sends `end` when this process ends; return its process id."""
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment, MARK: self.state.mark},
            cwd=self.state.temporary,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            preexec_fn=processes.ending_with_parent(end),
        )
        process.returncode = 0  # `_reap` collects it; Popen must not warn that nobody did.
        return process.pid

    def _start_gateway(self) -> None:
        """Start the gateway process, which logs to supervisor.log."""
        self.gateway, self._begun = self._start(self.state.gateway, signal.SIGTERM), time.monotonic()
        self._save(gateway_process=self.gateway)

    def _watch_gateway(self) -> None:
        """Start the gateway again after it ended; it is a failure if it ended before the server was ready."""
        if self._due is not None and time.monotonic() >= self._due:
            self._due = None
            self._start_gateway()
        if self.reason is not None or self.gateway is None or self.gateway not in self.exits:
            return
        ended = f"the gateway ended by itself ({_exit(self.exits.pop(self.gateway))})"
        if not self.state.ready:
            self._fail(ended)
            return
        has_run = time.monotonic() - self._begun > _LONGEST_PAUSE
        self._pause = _PAUSE if has_run else min(2 * self._pause, _LONGEST_PAUSE)
        logger.error("%s; starting it again in %g s", ended, self._pause)
        self.gateway, self._due = None, time.monotonic() + self._pause

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


def _exit(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


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
