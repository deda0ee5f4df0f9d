"""One server of a comparison: what is said of it, how it is started, asked, and stopped with all it started."""

from __future__ import annotations

import http.client
import os
import time
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol
from urllib.parse import urlsplit

import psutil

from beeline.errors import BeelineError, Undetermined
from bench.compare.wire import Wire
from host import ROOT
from serve.servers.protocol import Say

DOCUMENTED, OURS = "as documented", "our engine"
# Seconds that a server may take until its first answer, and that one answer may take.
PATIENCE = 240.0
_ANSWER_SECONDS = 60.0
_PAUSE = 0.1
_SHOWN = 160


@dataclass(frozen=True)
class Numbers:
    """How a server runs: requests a batch, processes or instances, milliseconds, threads of PyTorch in each.

    `threads` is None where the server's documentation sets none: then PyTorch's default holds.
    """

    batch: int
    workers: int
    delay_ms: int
    threads: int | None = None


@dataclass(frozen=True)
class Bench:
    """What all servers of a comparison get: the archive, and the folder with the model in each form."""

    archive: Path
    name: str
    precision: str
    labels: int
    model: Path
    config_file: Path


class Started(Protocol):
    """A server that was started. As a context manager it is stopped at the end, whatever happened."""

    url: str

    def __enter__(self) -> Started: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def check(self) -> None:
        """Raise `BeelineError` with its last words when it has ended by itself."""

    def processes(self) -> list[psutil.Process]:
        """Return everything that it started and that lives."""

    def threads(self) -> int | None:
        """Return how many threads PyTorch has in a worker, as the worker itself says; None where it does not."""


@dataclass(frozen=True)
class Peer(ABC):
    """One server. `kind` is `DOCUMENTED` or `OURS`; `pattern` says in a line what it is and after which page."""

    name: str
    kind: str
    pattern: str
    numbers: Numbers
    wire: Wire

    @abstractmethod
    def precision(self, bench: Bench) -> str:
        """Return in which precision it runs."""

    @abstractmethod
    def prepare(self, bench: Bench, say: Say) -> None:
        """Make its environment and files; not timed.

        Raises:
            BeelineError: why it cannot run here.
        """

    @abstractmethod
    def start(self, bench: Bench) -> Started:
        """Start it; it need not answer yet.

        Raises:
            BeelineError: why it does not start.
        """


class Client:
    """Asks one server for one picture after the other, over one connection."""

    def __init__(self, url: str, wire: Wire) -> None:
        parts = urlsplit(url)
        self.wire = wire
        self.said = "nothing"
        self._path = parts.path + (f"?{parts.query}" if parts.query else "")
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_ANSWER_SECONDS)

    def label(self, data: bytes) -> str | None:
        """Return the label of a picture; None where it was not answered with one."""
        try:
            self._connection.request("POST", self._path, self.wire.encode(data), dict(self.wire.headers))
            response = self._connection.getresponse()
            body = response.read()
            self.said = f"{response.status} {body[:_SHOWN].decode(errors='replace')}"
            return self.wire.read(body) if response.status == 200 else None
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.said = error_text(error)
            self._connection.close()
            return None

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def labels(
    url: str, wire: Wire, bodies: tuple[bytes, ...], clients: int, said: list[str] | None = None
) -> list[str | None]:
    """Return the label of each picture, asked by so many clients at once.

    What the server said instead of a label is added to `said`.
    """

    def share(start: int) -> list[str | None]:
        client = Client(url, wire)
        found = []
        try:
            for data in bodies[start::clients]:
                found.append(client.label(data))
                if found[-1] is None and said is not None:
                    said.append(client.said)
        finally:
            client.close()
        return found

    with ThreadPoolExecutor(clients) as pool:
        shares = list(pool.map(share, range(clients)))
    return [shares[i % clients][i // clients] for i in range(len(bodies))]


def wait(started: Started, url: str, peer: Peer, data: bytes, patience: float = PATIENCE) -> None:
    """Wait until a picture is answered, then until as many at once are as workers can take.

    Raises:
        BeelineError: when the server ends before that. Undetermined: when it takes longer than `patience` seconds.
    """
    deadline = time.monotonic() + patience
    said: list[str] = []
    together = (data,) * max(2, 2 * peer.numbers.workers)
    for bodies in ((data,), together):
        while None in labels(url, peer.wire, bodies, len(bodies), said):
            started.check()
            if time.monotonic() > deadline:
                raise Undetermined(f"{peer.name} answers no picture after {patience:g} s but {said[-1]!r}")
            time.sleep(_PAUSE)


def memory_mb(processes: list[psutil.Process]) -> float:
    """Return the memory of processes in MB: each page once, shared ones in parts (PSS)."""
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            # It ended meanwhile.
            continue
    return round(total / 1e6, 1)


def error_text(error: Exception) -> str:
    """Return one line for a row, without where this machine keeps the repository."""
    text = " ".join(str(error).split()).replace(f"{ROOT}{os.sep}", "") or type(error).__name__
    return text if isinstance(error, BeelineError) else f"{type(error).__name__}: {text}"
