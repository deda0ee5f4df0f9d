"""A server that this process started: to stop, to detach, or to wait for."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from beeline.errors import BeelineError
from serve.instance import Instance, State, logs, supervisor


@dataclass
class Running:
    """A server that was started here. As a context manager it is stopped at the end."""

    instance: Instance
    state: State
    process: subprocess.Popen[bytes]
    pipe: int
    seconds: float = 0.0

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop everything of it and wait until it has ended."""
        if self.pipe >= 0:
            self._say(supervisor.STOP)
            os.close(self.pipe)
            self.pipe = -1
        self.process.wait()
        self._sweep()

    def detach(self) -> None:
        """Leave it running when this process ends."""
        self._say(supervisor.DETACH)
        os.close(self.pipe)
        self.pipe = -1
        # It outlives this process, so nobody waits for it here.
        self.process.returncode = 0

    def wait(self) -> None:
        """Wait until another process stops it; raise as `check` does."""
        self.process.wait()
        self.check()

    def check(self) -> None:
        """Raise BeelineError, with what is known, if it ended by itself."""
        if self.process.poll() is None:
            return
        self._sweep()
        reason, failed = self.instance.last_end() or ("no reason is known", True)
        if failed:
            files = ("supervisor",) if reason.startswith("the gateway") else ("console", "supervisor")
            words = (len(files) > 1 and logs.failure(self.instance.logs)) or _last_words(self.instance.logs, files)
            raise BeelineError(f"{self.state.server} ended: {reason}; its log says: {words} ({self.instance.logs})")

    def ready(self) -> None:
        """Tell the supervisor that the server answers."""
        self._say(supervisor.READY)

    def _sweep(self) -> None:
        """Clean up where the supervisor was killed before it could."""
        lock = None if self.instance.last_end() else self.instance.lock()
        if lock is not None:
            try:
                self.instance.sweep()
            finally:
                os.close(lock)

    def _say(self, word: bytes) -> None:
        try:
            os.write(self.pipe, word)
        except BrokenPipeError:
            # The supervisor has ended; `check` finds out why.
            return


def greeting(running: Running) -> list[str]:
    """Return the address, a command to try, and the next commands, for people."""
    state = running.state
    first = state.configuration["models"][0]["model"]
    page = state.addresses["page"]
    return [
        f"ready in {running.seconds:.1f} s: {state.inference}",
        *([f"  the page: {page or state.inference}"] if state.gateway else []),
        f"  curl -s {state.inference}/predictions/{first} -T picture.jpg",
        f'  curl -X PUT "{state.addresses["management"]}/models/{first}?min_worker=2&synchronous=true"',
        f"  beeline serve status | scale {first} --min 2 | logs | down",
    ]


def summary(running: Running) -> dict[str, object]:
    """Return the same as JSON values."""
    state = running.state
    return {
        "name": state.name,
        "server": state.server,
        "url": state.inference,
        "page": (state.addresses["page"] or state.inference) if state.gateway else None,
        "management": state.addresses["management"],
        "metrics": None if state.addresses["metrics"] is None else f"{state.addresses['metrics']}/metrics",
        "gateway": state.gateway_kind,
        "models": [{key: model[key] for key in ("model", "version")} for model in state.configuration["models"]],
        "seconds": round(running.seconds, 2),
        "supervisor": running.process.pid,
        "java": state.java,
        "logs": str(running.instance.logs),
    }


def _last_words(folder: Path, files: tuple[str, ...]) -> str:
    for name in files:
        path = folder / f"{name}.log"
        lines = [line for line in (logs.tail(path, 20) if path.is_file() else []) if line.strip()]
        if lines:
            return lines[-1].strip()
    return "nothing"
