"""A whole comparison: every server in turn, round after round, one of them twice, and what comes of it: a record."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from archive import mar, store
from beeline.errors import ArchiveError, BeelineError, ConfigError, Undetermined
from beeline.spec import ModelSpec
from bench import load
from bench import pictures as files
from bench.compare import peers as known
from bench.compare import torchscript
from bench.compare.peers import OURS, Numbers, Peer
from bench.compare.server import Bench, Server, ask, error_text, pack, stop_leftovers
from bench.pictures import Pictures
from bench.record import Record, interval, utc
from host import ROOT, machine
from host.signals import Interrupted
from serve import config, properties
from serve.servers.protocol import Say

WARM_UP = 2.0
_CLIENTS = 8
FASTER, SLOWER, SAME = "faster", "slower", "no difference"
# The interval holds the median of the ratios at least this often; five rounds are the fewest with which it can.
_CONFIDENCE = 0.9
# Differences below this are nobody's reason to choose a server, and a shared machine makes them by itself.
_MARGIN = 0.02


@dataclass(frozen=True)
class Request:
    """What to compare.

    Attributes:
        archive: what every server serves.
        picture: what is sent, a file or a folder.
        agreement: pictures on which each is asked for its first label; None asks nothing.
        servers: by name; empty means those compared by default.
        clients: of the load.
        rounds: turns of each server.
        seconds: that each turn is measured.
        overrides: numbers of our engine that win over the configuration file.
        reference: an fp32 archive of the same model; None takes the archive itself.
        command: the command line that compares again.
        config_file: the numbers of our engine.
    """

    archive: Path
    picture: Path
    agreement: Path | None = None
    servers: tuple[str, ...] = ()
    clients: int = 50
    rounds: int = 5
    seconds: float = 8.0
    overrides: config.Overrides = field(default_factory=config.Overrides)
    reference: Path | None = None
    command: str = ""
    config_file: Path = ROOT / "config" / "config.properties"

    def peers(self) -> tuple[Peer, ...]:
        """Return all servers, ours with the numbers that `serve up` would take on this machine.

        Raises:
            ArchiveError: for an archive that is not there. ConfigError: for a number out of range.
        """
        found, cores = store.find_archives(self.archive.parent, (str(self.archive),)), machine.cores()
        read = properties.load(self.config_file, os.environ)
        resolved = config.resolve(read, found, self.overrides, os.environ, cores, gpus=0)
        (model,) = resolved.models
        numbers = (model.batch_size, model.min_workers, model.max_batch_delay, resolved.threads)
        return known.everything(found[0].model, cores, Numbers(*(number.value for number in numbers)))


@dataclass(frozen=True)
class Load:
    """What each turn sends: pictures, from so many clients, for so many seconds.

    `check` has pictures that are asked before, each with the label that the fp32 reference has for it.
    """

    pictures: Pictures
    clients: int
    seconds: float
    check: Sequence[tuple[bytes, str]] = ()


@dataclass(frozen=True)
class Measurement:
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


Take = Callable[[Peer, Bench, Load], Measurement]


@dataclass
class Entry:
    """One server of a comparison and its turns so far; `error` ends it."""

    peer: Peer
    turns: list[Measurement] = field(default_factory=list)
    error: str | None = None

    @property
    def rates(self) -> list[float]:
        """Good answers a second, one a round."""
        return [turn.per_second for turn in self.turns]


def compare(request: Request, say: Say) -> Record:
    """Compare, and return the record.

    Raises:
        BeelineError: for what does not hold before the first server starts; later a row says it.
    """
    if request.rounds < 1 or request.clients < 1 or request.seconds <= 0:
        given = f"--rounds is {request.rounds}, --clients {request.clients}, --seconds {request.seconds:g}"
        raise ConfigError(f"{given}; give more than 0")
    if left := stop_leftovers():
        say(f"stopped {len(left)} processes that a killed comparison had left: {left}")
    started, sent = utc(), files.read(request.picture)
    asked = None if request.agreement is None else files.read(request.agreement)
    peers = known.choose(request.peers(), request.servers)
    with prepared(request.archive, request.config_file, request.reference) as bench:
        check = list(zip(asked.bodies, torchscript.labels(bench.model, asked), strict=True)) if asked else []
        result = run(peers, bench, Load(sent, request.clients, request.seconds, check), request.rounds, say)
    versions = {name: version for peer in peers for name, version in peer.pinned().items()}
    return Record.now("compare", request.command, result, sent, versions, started)


@contextmanager
def prepared(archive: Path, config_file: Path, reference: Path | None = None) -> Iterator[Bench]:
    """Unpack the archive and convert its model, in a folder that is removed at the end.

    Args:
        archive: what is served.
        config_file: for `serve up`.
        reference: an fp32 archive of the same model, for the other servers and for agreement.

    Raises:
        ArchiveError: for an archive that is none of Beeline's, or that cannot be converted.
    """
    (found,) = store.find_archives(archive.parent, (str(archive.resolve()),))
    with tempfile.TemporaryDirectory(prefix="beeline-compare-") as scratch:
        model = plain = Path(scratch) / "model"
        spec = plain_spec = _unpack(archive, model)
        if reference is not None:
            plain = Path(scratch) / "reference"
            plain_spec = _unpack(reference, plain)
            if plain_spec.labels != spec.labels:
                raise ArchiveError(f"{reference} has other labels than {archive}; name an archive of the same model")
        torchscript.write(plain, plain_spec, model)
        yield Bench(archive, found.model, spec.precision, len(spec.labels), model, config_file)


def run(
    peers: Sequence[Peer], bench: Bench, load: Load, rounds: int, say: Say, turn: Take | None = None
) -> dict[str, Any]:
    """Let every server have its turn in each round, and one of them a second turn at the round's end.

    Asked to end, the server that runs is stopped and the rounds so far are the result.

    Args:
        peers: in the order of their turns; the first of each class is what its class is compared with.
        bench: what they serve.
        load: of each turn; each server is checked once.
        rounds: how many turns each has.
        say: takes each line of progress.
        turn: runs one turn, for tests.

    Returns:
        Plain JSON values: a row a server.
    """
    entries = [Entry(peer) for peer in peers]
    # Entered twice: the first of ours, which starts fast, else the first.
    original = next((entry for entry in entries if entry.peer.kind == OURS), entries[0])
    twin, interrupted = Entry(original.peer), False
    try:
        for entry in entries:
            try:
                entry.peer.prepare(say)
                pack(entry.peer, bench)
            except Exception as error:  # noqa: BLE001 - a server that cannot run here is a row that says why
                entry.error = error_text(error)
                say(f"{entry.peer.name}: cannot run here: {entry.error}")
        twin.error = original.error
        for number in range(1, rounds + 1):
            for entry in (*entries, twin):
                if entry.error is not None:
                    continue
                try:
                    is_first = number == 1 and entry is not twin
                    sent = load if is_first else replace(load, check=())
                    entry.turns.append((turn or take)(entry.peer, bench, sent))
                except Exception as error:  # noqa: BLE001 - likewise
                    entry.error = error_text(error)
                again = " again" if entry is twin else ""
                say(f"round {number}/{rounds}: {entry.peer.name}{again}: {_progress(entry)}")
    except Interrupted as stop:
        say(f"stopped ({stop}); the rounds so far count")
        interrupted = True
    firsts: dict[str, Entry] = {}
    for entry in entries:
        if entry.turns:
            firsts.setdefault(entry.peer.kind, entry)
    return {
        "clients": load.clients,
        "rounds": rounds,
        "seconds": load.seconds,
        "interrupted": interrupted,
        "rows": [_row(entry, firsts.get(entry.peer.kind), bench) for entry in entries],
        "aa": _row(twin, original, bench),
    }


def take(peer: Peer, bench: Bench, sent: Load) -> Measurement:
    """Run one turn; the server is stopped at its end whatever happens.

    Raises:
        BeelineError: why the server does not run or answer, in both of two attempts.
    """
    wire = peer.wire
    pictures, agreement = wire.pictures(sent.pictures), None
    for restarts in (0, 1):
        began = time.monotonic()
        with Server(peer, bench) as server:
            try:
                server.wait(sent.pictures.bodies[0])
            except BeelineError as error:
                # Some have races in their start, as PyTriton's second instance has one second for the first.
                if restarts or isinstance(error, Undetermined):
                    raise
                continue
            ready = round(time.monotonic() - began, 2)
            if sent.check:
                # A picture without an answer counts against the server.
                answers = ask(server.url, wire, [body for body, _ in sent.check], _CLIENTS)
                same = [label == other for (label, _), (_, other) in zip(answers, sent.check, strict=True)]
                agreement = sum(same) / len(same)
            plan = load.Plan(server.url, pictures, sent.seconds, WARM_UP, clients=sent.clients, headers=wire.headers)
            figures = load.run(plan).summary()
            server.check()
            counts = figures["good_per_second"], figures["p95_ms"], figures["failed"]
            return Measurement(*counts, server.memory_mb(), ready, server.threads(), agreement, restarts)
    raise AssertionError("the second attempt returns or raises")


def _progress(entry: Entry) -> str:
    if entry.error is not None:
        return f"failed: {entry.error}"
    last = entry.turns[-1]
    p95 = "no answer" if last.p95_ms is None else f"p95 {last.p95_ms:.0f} ms"
    return f"{last.per_second:.1f}/s, {p95}, {last.failed} failed, ready in {last.ready_s:.1f} s"


def _row(entry: Entry, first: Entry | None, bench: Bench) -> dict[str, Any]:
    """Return one server's row, compared with the first of its class that ran."""
    peer, turns = entry.peer, entry.turns
    threads = [turn.threads for turn in turns if turn.threads is not None]
    agreements = [turn.agreement for turn in turns if turn.agreement is not None]
    return {
        "server": peer.name,
        "class": peer.kind,
        "pattern": peer.pattern,
        "threads": threads[-1] if threads else peer.numbers.threads,
        "precision": bench.precision if peer.kind == OURS else "fp32 TorchScript",
        "batch": peer.numbers.batch,
        "workers": peer.numbers.workers,
        "delay_ms": peer.numbers.delay_ms,
        "per_second": entry.rates,
        "p95_ms": [turn.p95_ms for turn in turns],
        "compared_with": first.peer.name if first is not None else None,
        **judge(entry.rates, first.rates if first else ()),
        "failed": sum(turn.failed for turn in turns),
        "restarts": sum(turn.restarts for turn in turns),
        "agreement": agreements[0] if agreements else None,
        "memory_mb": round(statistics.median(turn.memory_mb for turn in turns), 1) if turns else None,
        "ready_s": round(statistics.median(turn.ready_s for turn in turns), 1) if turns else None,
        "error": entry.error,
    }


def judge(rates: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """Compare the requests a second of two servers that were measured in the same rounds, in the same order.

    A machine's speed drifts from round to round, so each round gives one ratio. A server is faster or slower only where
    the interval of their median lies more than `_MARGIN` off 1; rounds that are too few for one prove nothing.

    Returns:
        The median `ratio` to the other, its `interval` and `verdict`; None where there is no round with both.
    """
    ratios = sorted(rate / other for rate, other in zip(rates, others, strict=False) if other > 0)
    if not ratios:
        return dict.fromkeys(("ratio", "interval", "verdict"))
    known, word = interval(ratios, confidence=_CONFIDENCE), SAME
    low, high = known or (ratios[0], ratios[-1])
    if known and (low > 1 + _MARGIN or high < 1 - _MARGIN):
        word = FASTER if low > 1 else SLOWER
    bounds = [round(low, 3), round(high, 3)]
    return {"ratio": round(statistics.median(ratios), 3), "interval": bounds, "verdict": word}


def _unpack(archive: Path, folder: Path) -> ModelSpec:
    folder.mkdir()
    mar.unpack(archive, folder)
    return ModelSpec.load(folder)
