"""Beeline's own archive on TorchServe or Multi Model Server, as `beeline serve up` runs it."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from bench.compare.peer import Bench, Peer
from bench.compare.wire import Wire, raw
from host import processes
from serve import servers
from serve.addresses import Ports
from serve.config import Overrides
from serve.gateway.nginx import choose
from serve.instance import MARK
from serve.instance.child import Running
from serve.servers.protocol import Say
from serve.up import Request, up


@dataclass(frozen=True)
class Own(Peer):
    """One of the two servers, alone or behind nginx; see `Peer`."""

    server: str
    gateway: str = "none"

    def precision(self, bench: Bench) -> str:
        """Return the archive's."""
        return bench.precision

    def prepare(self, bench: Bench, say: Say) -> None:
        """Install the server's environment, and look for nginx; see `Peer`."""
        servers.named(self.server).prepare(say)
        choose(self.gateway, os.environ)

    def start(self, bench: Bench) -> Up:
        """Start it with the comparison's numbers; it answers already; see `Peer`."""
        state = Path(tempfile.mkdtemp(prefix="beeline-compare-"))
        numbers = self.numbers
        asked = Request(
            server=self.server,
            wanted=(str(bench.archive.resolve()),),
            store=bench.archive.resolve().parent,
            config_file=bench.config_file,
            name="compare",
            overrides=Overrides(numbers.batch, numbers.workers, numbers.delay_ms),
            ports=Ports(0),
            gateway=self.gateway,
        )
        environ = {**os.environ, "BEELINE_STATE": str(state), "BEELINE_DEVICE": "cpu"}
        try:
            return Up(up(asked, lambda line: None, environ), state)
        except BaseException:
            shutil.rmtree(state, ignore_errors=True)
            raise


class Up:
    """A started `Own`; see `Started`."""

    def __init__(self, running: Running, state: Path) -> None:
        self.running = running
        self.url = running.state.inference
        self._state = state

    def __enter__(self) -> Up:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.running.stop()
        finally:
            shutil.rmtree(self._state, ignore_errors=True)

    def check(self) -> None:
        """See `Started`."""
        self.running.check()

    def processes(self) -> list[psutil.Process]:
        """See `Started`."""
        return processes.marked(MARK, f"{self.running.instance.folder}:", Path(self.running.state.temporary))

    def threads(self) -> int | None:
        """See `Started`."""
        return int(self.running.state.configuration["threads"]["value"])


def wire(model: str) -> Wire:
    """The picture as the body of a prediction."""
    return raw(f"/predictions/{model}")
