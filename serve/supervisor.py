"""The small process above a server: starts Java, adopts orphaned workers, and leaves nothing behind.

TorchServe's and MMS's own launchers leave Java running on SIGTERM, and MMS leaves workers when Java
dies. So neither is used: this process starts Java itself, is told to stop by a signal or by the end of
the pipe that it was given (the command in the foreground died, however that happened), and then stops
the whole tree. Run as `python -m serve.supervisor FOLDER LOCK PIPE`; it inherits the two descriptors.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from serve import processes
from serve.instance import MARK, Instance, State, remove_scratch

READY, DETACH, STOP = b"ready\n", b"detach\n", b"stop\n"
CONSOLE = "console.log"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


class Supervisor:
    """Runs one instance from the start of Java until nothing of it is left."""

    def __init__(self, instance: Instance, state: State, pipe: int) -> None:
        self.instance = instance
        self.state = dataclasses.replace(state, supervisor=os.getpid())
        self.pipe: int | None = pipe
        self.exits: dict[int, int] = {}
        self.reason: str | None = None

    def run(self) -> int:
        """Supervise until the end; return the exit code, 1 when Java ended by itself."""
        wake, alarm = os.pipe()
        os.set_blocking(alarm, False)
        signal.set_wakeup_fd(alarm)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._asked)
        signal.signal(signal.SIGCHLD, _noted)
        # Orphans (MMS's forked workers, a dead worker's children) become children of this process.
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.instance.write(self.state)
        failed = False
        try:
            java = self._start()
            while self.reason is None:
                watched = [wake] + ([self.pipe] if self.pipe is not None else [])
                readable, _, _ = select.select(watched, [], [], 1.0)
                if wake in readable:
                    os.read(wake, 4096)
                if self.pipe in readable:
                    self._listen()
                self._reap()
                if self.reason is None and java in self.exits:
                    failed = True
                    self.reason = f"Java ended by itself ({_exit(self.exits[java])})"
            self._stop(java)
        except Exception as error:
            failed = True
            self.reason = f"the supervisor failed ({type(error).__name__}: {error})"
            raise
        finally:
            processes.stop_marked(MARK, self.state.mark, self.state.grace / 2)
            remove_scratch(Path(self.state.temporary))
            self.instance.end(self.reason or "its supervisor ended", failed)
        return 1 if failed else 0

    def _start(self) -> int:
        """Start Java and return its process id."""
        environment = {**os.environ, **self.state.environment, MARK: self.state.mark}
        with (self.instance.logs / CONSOLE).open("ab") as console:
            java = subprocess.Popen(
                self.state.command,
                env=environment,
                cwd=self.state.temporary,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                preexec_fn=functools.partial(_die_with, os.getpid()),
            )
        java.returncode = 0  # `_reap` collects it; Popen must not warn that nobody did.
        self.state = dataclasses.replace(self.state, java=java.pid)
        self.instance.write(self.state)
        return java.pid

    def _listen(self) -> None:
        """Take what the command in the foreground says; its end is an order to stop unless it detached."""
        assert self.pipe is not None
        said = os.read(self.pipe, 4096)
        if READY in said:
            self.state = dataclasses.replace(self.state, ready=True)
            self.instance.write(self.state)
        if DETACH in said:
            os.close(self.pipe)
            self.pipe = None
        elif STOP in said:
            self.reason = "stopped as asked"
        elif not said:
            self.reason = "the command that started it ended"

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self.exits[pid] = os.waitstatus_to_exitcode(status)

    def _stop(self, java: int) -> None:
        """End Java before its workers, or it would start new ones."""
        number = signal.SIGTERM
        deadline = time.monotonic() + self.state.grace
        while java not in self.exits:
            try:
                os.kill(java, number)
            except ProcessLookupError:
                return
            while java not in self.exits and time.monotonic() < deadline:
                time.sleep(0.05)
                self._reap()
            number, deadline = signal.SIGKILL, deadline + self.state.grace

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or f"stopped as asked ({signal.Signals(number).name})"


def _noted(number: int, frame: FrameType | None) -> None:
    """Let SIGCHLD wake the loop; a signal without a handler would not."""


def _die_with(parent: int) -> None:
    """In the child, before Java: the kernel kills it when the supervisor dies, even by SIGKILL."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _exit(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def main(arguments: list[str]) -> int:
    """Run the supervisor of the instance in the folder that is the first argument."""
    instance = Instance(Path(arguments[0]))
    state = instance.read()
    if state is None:
        raise SystemExit(f"{instance.folder} has no state to start from")
    return Supervisor(instance, state, int(arguments[2])).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
