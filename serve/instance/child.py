"""A server that this process started: stop it, detach it, or wait for it."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from beeline.errors import BeelineError
from serve.instance import Instance, State, logs, supervisor


@dataclass
class Running:
    """A server that this process started; as a context manager it stops the server at the end, unless detached."""

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
        """Stop all its processes and wait until they have ended; nothing to do for a detached server."""
        if self.pipe >= 0:
            self._say(supervisor.STOP, last=True)
            self.process.wait()
            self._sweep()

    def detach(self) -> None:
        """Leave it running when this process ends."""
        self._say(supervisor.DETACH, last=True)
        # It outlives this process, so Popen must not warn that nobody waited for it.
        self.process.returncode = 0

    def wait(self) -> None:
        """Wait until another process stops it; raise as `check` does."""
        self.process.wait()
        self.check()

    def check(self) -> None:
        """Raise BeelineError, with the reason from its log, if it ended by itself."""
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
        """Clean up if the supervisor was killed before it could."""
        if self.instance.last_end() is None:
            self.instance.sweep_dead(patience=1.0)

    def _say(self, word: bytes, last: bool = False) -> None:
        # Where the supervisor has ended, `check` finds out why.
        with suppress(BrokenPipeError):
            os.write(self.pipe, word)
        if last:
            os.close(self.pipe)
            self.pipe = -1


def greeting(running: Running) -> list[str]:
    """Return for people: the address, a command to try, and the next commands."""
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
    """Return for programs: addresses, models, processes, as JSON values."""
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
        "server_process": state.server_process,
        "logs": str(running.instance.logs),
    }


def _last_words(folder: Path, files: tuple[str, ...]) -> str:
    for name in files:
        path = folder / f"{name}.log"
        if lines := [line for line in (logs.tail(path, 20) if path.is_file() else []) if line.strip()]:
            return lines[-1].strip()
    return "nothing"
