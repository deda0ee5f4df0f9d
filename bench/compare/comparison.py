"""A comparison: every server has its turn in each round, one of them has two, and a record keeps the figures."""

from __future__ import annotations

import itertools
import operator
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from archive import mar, store
from beeline.errors import ArchiveError, BeelineError, Undetermined
from beeline.spec import ModelSpec
from bench import load
from bench.compare import torchscript
from bench.compare.peers import OURS, Peer, choose, everything
from bench.compare.server import Setup, ask, error_text, running, stop_leftovers
from bench.pictures import read
from bench.record import Journal, Record, judge, utc
from bench.tune.server import configured
from host import ROOT, machine
from host.files import sha256
from host.signals import Interrupted
from serve import properties
from serve.config import Overrides
from serve.servers.protocol import Say


@dataclass(frozen=True)
class Request:
    """What to compare, as in the options of `beeline bench compare`."""

    archive: Path
    picture: Path
    agreement: Path | None = None  # pictures whose first labels each server is asked for
    servers: tuple[str, ...] = ()  # names; by default those of `choose`
    clients: int = 50
    rounds: int = 5
    seconds: float = 8.0
    overrides: Overrides = field(default_factory=Overrides)  # of the servers with our engine
    reference: Path | None = None
    command: str = ""  # that repeats it
    config_file: Path = ROOT / "config" / "config.properties"

    def peers(self) -> list[Peer]:
        """Return all servers, ours with the settings that `serve up` would take on this machine; it raises the same."""
        (archive,) = store.find_archives(self.archive.parent, (str(self.archive),))
        numbers, environ = properties.load(self.config_file, os.environ), {**os.environ, "BEELINE_DEVICE": "cpu"}
        return everything(archive.model, machine.cores(), configured(archive, numbers, environ, self.overrides))


def compare(request: Request, say: Say) -> tuple[Record, Path]:
    """Compare, and return the record and the journal; an interrupted comparison goes on with the turns in its journal.

    Raise `BeelineError` for what is wrong before the first server starts; later errors are in the servers' rows.
    """
    if stopped := stop_leftovers():
        say(f"stopped {len(stopped)} processes of a killed comparison: {stopped}")
    started, peers = utc(), choose(request.peers(), request.servers)
    with prepared(request) as setup:
        about = {
            "archives": [sha256(path) for path in (request.archive, request.reference) if path],
            "pictures": [each.to_dict()["sha256"] for each in (setup.pictures, setup.agreement) if each],
            "load": [request.clients, request.seconds],
            "servers": [(peer.name, *astuple(peer.settings), peer.pinned()) for peer in peers],
            "configuration": sha256(request.config_file),
        }
        journal = Journal.job(f"compare-{request.archive.stem}", about)
        if journal.rows:
            say(f"turns measured before the interruption: {len(journal.rows)}; without {journal.path} it begins again")
        result = run(peers, setup, request.rounds, journal, say)
    record = Record.now("compare", request.command, result, setup.pictures, started)
    for peer in peers:
        record.versions.update(peer.pinned())
    return record, journal.path


@contextmanager
def prepared(request: Request) -> Iterator[Setup]:
    """Read pictures, unpack and convert the archive in a temporary folder; raise `ArchiveError` if that fails."""
    pictures = read(request.picture)
    agreement = read(request.agreement) if request.agreement else None
    with tempfile.TemporaryDirectory(prefix="beeline-compare-") as scratch:
        model, plain = Path(scratch) / "model", Path(scratch) / "reference"
        mar.unpack(request.archive, model)
        mar.unpack(request.reference or request.archive, plain)
        spec, plain_spec = ModelSpec.load(model), ModelSpec.load(plain)
        if plain_spec.labels != spec.labels:
            names = f"{request.reference} has other labels than {request.archive}"
            raise ArchiveError(f"{names}; name an archive of the same model with --reference")
        torchscript.write(plain, plain_spec, model)
        labels = torchscript.labels(model, plain_spec, agreement) if agreement else ()
        load = (pictures, request.clients, request.seconds, agreement, labels)
        yield Setup(request.archive, request.config_file, model, spec.precision, *load)


def take(peer: Peer, setup: Setup) -> dict[str, Any]:
    """Run one turn and return its figures; raise `BeelineError` with the reason if the second start fails too.

    `agreement` is None without pictures for it; `restarts` counts starts that ended before the first answer.
    """
    wire, restarts = peer.wire, 0
    sent = replace(setup.pictures, bodies=tuple(map(wire.encode, setup.pictures.bodies)))
    while True:
        began = time.monotonic()
        with running(peer, setup) as server:
            try:
                server.wait(setup.pictures.bodies[0])
            except BeelineError as error:
                # Some starts are races: PyTriton's second instance waits one second for the first.
                if restarts or isinstance(error, Undetermined):
                    raise
                restarts += 1
                continue
            ready_s, agreement = round(time.monotonic() - began, 2), None
            if setup.agreement:
                # A picture without an answer counts against the server.
                labels = [label for label, _ in ask(server, setup.agreement.bodies, clients=8)]
                agreement = sum(map(operator.eq, labels, setup.labels)) / len(labels)
            plan = load.Plan(server.url, sent, setup.seconds, clients=setup.clients, headers=wire.headers)
            summary = load.run(plan).summary()
            server.check()
            return {
                "per_second": summary["good_per_second"],
                "p95_ms": summary["p95_ms"],
                "failed": summary["failed"],
                "memory_mb": server.memory_mb(),
                "ready_s": ready_s,
                "threads": server.threads(),
                "agreement": agreement,
                "restarts": restarts,
            }


def run(
    peers: Sequence[Peer],
    setup: Setup,
    rounds: int,
    journal: Journal,
    say: Say,
    take: Callable[[Peer, Setup], dict[str, Any]] = take,
) -> dict[str, Any]:
    """Give every server one turn in each round, and one of them a second turn at the round's end (A/A).

    Each is compared with the first of its class that was measured, and asked for its agreement in its first turn. An
    error ends a server's turns. What the journal has is not measured again. Ctrl-C or SIGTERM stops the running server.
    Return the turns so far as the record's result: a row for each server, and the row `aa` of the second turns.
    """
    # The first server with our engine, which starts fast, else the first.
    twice = next((peer for peer in peers if peer.kind == OURS), peers[0])
    names = {peer.name: peer for peer in peers} | {f"{twice.name}, again": twice}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}

    def attempt(peer: Peer, setup: Setup) -> dict[str, Any]:
        try:
            peer.prepare(say)
            return take(peer, setup)
        except Exception as error:  # noqa: BLE001 - a server that cannot run here is a row with the reason
            return {"error": error_text(error)}

    is_interrupted = False
    try:
        for number, (name, peer) in itertools.product(range(1, rounds + 1), names.items()):
            if not any("error" in turn for turn in turns[name]):
                asked = setup if number == 1 and name == peer.name else replace(setup, agreement=None)
                turn = journal.once(f"{name} {number}", partial(attempt, peer, asked))
                turns[name].append(turn)
                say(f"round {number}/{rounds}: {name}: {', '.join(f'{key} {turn[key]}' for key in turn)}")
    except Interrupted as interruption:
        say(f"interrupted ({interruption}); the turns so far count, and the same command goes on from there")
        is_interrupted = True
    *rows, again = (_row(peer, turns[name], setup.precision) for name, peer in names.items())
    firsts = {row["class"]: row for row in reversed(rows) if row["per_second"]}
    return {
        "clients": setup.clients,
        "rounds": rounds,
        "seconds": setup.seconds,
        "interrupted": is_interrupted,
        "rows": [_compared(row, firsts.get(row["class"])) for row in rows],
        "aa": _compared(again, next(row for row in rows if row["server"] == twice.name)),
    }


def _row(peer: Peer, turns: Sequence[dict[str, Any]], precision: str) -> dict[str, Any]:
    """Return one server's row, which `_compared` completes."""
    good = [turn for turn in turns if "error" not in turn]
    return {
        "server": peer.name,
        "class": peer.kind,
        "pattern": peer.pattern,
        "threads": good[-1]["threads"] if good else peer.settings.threads or None,
        "precision": precision if peer.kind == OURS else "fp32 TorchScript",
        "batch": peer.settings.batch_size,
        "workers": peer.settings.workers,
        "delay_ms": peer.settings.max_batch_delay,
        "per_second": [turn["per_second"] for turn in good],
        "p95_ms": [turn["p95_ms"] for turn in good],
        "failed": sum(turn["failed"] for turn in good),
        "restarts": sum(turn["restarts"] for turn in good),
        "agreement": good[0]["agreement"] if good else None,
        "memory_mb": round(statistics.median(turn["memory_mb"] for turn in good), 1) if good else None,
        "ready_s": round(statistics.median(turn["ready_s"] for turn in good), 1) if good else None,
        "error": next((turn["error"] for turn in turns if "error" in turn), None),
    }


def _compared(row: dict[str, Any], first: dict[str, Any] | None) -> dict[str, Any]:
    verdict = judge(row["per_second"], first["per_second"] if first else ())
    return {**row, "compared_with": first and first["server"], **verdict}
