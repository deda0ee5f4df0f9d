"""One server's turn: started, waited for, asked whether it is right, loaded, weighed, stopped."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from beeline.errors import BeelineError, Undetermined
from bench.compare import agreement
from bench.compare.peer import Bench, Peer, labels, memory_mb, wait
from bench.load import Plan, run
from bench.pictures import Pictures

WARM_UP = 2.0
_ASKERS = 8


@dataclass(frozen=True)
class Load:
    """What each turn sends: pictures, from so many clients, for so long; seconds."""

    pictures: Pictures
    clients: int
    seconds: float


@dataclass(frozen=True)
class Check:
    """Pictures with the labels that the fp32 reference has for them."""

    pictures: Pictures
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Turn:
    """What one turn found: good answers a second, ms, failed requests, MB, seconds.

    `agreement` is None where it was not asked; `restarts` counts starts that ended before the first answer.
    """

    per_second: float
    p95_ms: float | None
    failed: int
    memory_mb: float
    ready_s: float
    threads: int | None
    agreement: float | None
    restarts: int = 0


def take(peer: Peer, bench: Bench, load: Load, check: Check | None) -> Turn:
    """Run one turn; the server is stopped at its end whatever happens.

    Raises:
        BeelineError: why the server does not run or answer, in both of two attempts.
    """
    try:
        return _attempt(peer, bench, load, check)
    except _NotReady:
        # Some have races in their start, as PyTriton's second instance has one second for the first.
        try:
            return replace(_attempt(peer, bench, load, check), restarts=1)
        except _NotReady as error:
            raise error.reason from error


class _NotReady(Exception):
    """A server that ended before its first answer."""

    def __init__(self, reason: BeelineError) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _attempt(peer: Peer, bench: Bench, load: Load, check: Check | None) -> Turn:
    began = time.monotonic()
    with peer.start(bench) as started:
        url = started.url + peer.wire.path
        try:
            wait(started, url, peer, load.pictures.bodies[0])
        except Undetermined:
            raise
        except BeelineError as error:
            raise _NotReady(error) from error
        ready = time.monotonic() - began
        agrees = None
        if check is not None:
            agrees = agreement.share(labels(url, peer.wire, check.pictures.bodies, _ASKERS), check.labels)
        found = run(_plan(url, peer, load)).summary()
        started.check()
        return Turn(
            found["good_per_second"],
            found["p95_ms"],
            found["failed"],
            memory_mb(started.processes()),
            round(ready, 2),
            started.threads(),
            agrees,
        )


def _plan(url: str, peer: Peer, load: Load) -> Plan:
    return Plan(
        url,
        peer.wire.pictures(load.pictures),
        seconds=load.seconds,
        warm_up=WARM_UP,
        clients=load.clients,
        headers=peer.wire.headers,
    )
