"""A whole comparison: every server in turn, round after round, one of them twice, and what comes of it."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from archive import mar, store
from beeline.errors import ArchiveError
from beeline.spec import ModelSpec
from bench.compare import agreement, torchscript
from bench.compare.peer import OURS, Bench, Peer, error_text
from bench.compare.turn import Check, Load, Turn, take
from bench.compare.verdict import judge
from bench.pictures import Pictures
from host.signals import Interrupted
from serve.servers.protocol import Say

Take = Callable[[Peer, Bench, Load, Check | None], Turn]


@dataclass
class Entry:
    """One server of a comparison and its turns so far; `error` ends it."""

    peer: Peer
    turns: list[Turn] = field(default_factory=list)
    error: str | None = None

    @property
    def rates(self) -> list[float]:
        """Good answers a second, one a round."""
        return [turn.per_second for turn in self.turns]


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
    (found,) = store.find(archive.parent, (str(archive.resolve()),))
    with tempfile.TemporaryDirectory(prefix="beeline-compare-") as scratch:
        model = Path(scratch) / "model"
        spec = _unpack(archive, model)
        plain, plain_spec = model, spec
        if reference is not None:
            plain = Path(scratch) / "reference"
            plain_spec = _unpack(reference, plain)
            if plain_spec.labels != spec.labels:
                raise ArchiveError(f"{reference} has other labels than {archive}; name an archive of the same model")
        torchscript.write(plain, plain_spec, model)
        yield Bench(archive, found.model, spec.precision, len(spec.labels), model, config_file)


def check(bench: Bench, pictures: Pictures | None) -> Check | None:
    """Return the pictures with the reference's labels, or None where there are none to agree on."""
    return None if pictures is None else Check(pictures, tuple(agreement.reference(bench.model, pictures)))


def run(
    peers: Sequence[Peer],
    bench: Bench,
    load: Load,
    rounds: int,
    agreement_check: Check | None,
    say: Say,
    turn: Take = take,
) -> dict[str, Any]:
    """Let every server have its turn in each round, and one of them a second turn at the round's end.

    Asked to end, the server that runs is stopped and the rounds so far are the result.

    Args:
        peers: in the order of their turns; the first of each class is what its class is compared with.
        bench: what they serve.
        load: of each turn.
        rounds: how many turns each has.
        agreement_check: asked of each server once.
        say: takes each line of progress.
        turn: runs one turn, for tests.
    """
    entries = [Entry(peer) for peer in peers]
    twin = Entry(_twin(peers))
    interrupted = False
    try:
        for entry in entries:
            _prepare(entry, bench, say)
        twin.error = next(entry.error for entry in entries if entry.peer is twin.peer)
        for number in range(1, rounds + 1):
            for entry in (*entries, twin):
                if entry.error is None:
                    asked = agreement_check if number == 1 and entry is not twin else None
                    _turn(entry, bench, load, asked, turn)
                    again = " again" if entry is twin else ""
                    say(f"round {number}/{rounds}: {entry.peer.name}{again}: {_told(entry)}")
    except Interrupted as asked_to_end:
        say(f"stopped ({asked_to_end}); the rounds so far count")
        interrupted = True
    return result(entries, twin, bench, load, rounds, interrupted)


def result(
    entries: Sequence[Entry], twin: Entry, bench: Bench, load: Load, rounds: int, interrupted: bool
) -> dict[str, Any]:
    """Return plain JSON values: a row a server, compared with the first of its class that ran."""
    firsts: dict[str, Entry] = {}
    for entry in entries:
        if entry.rates:
            firsts.setdefault(entry.peer.kind, entry)
    original = next(entry for entry in entries if entry.peer is twin.peer)
    return {
        "clients": load.clients,
        "rounds": rounds,
        "seconds": load.seconds,
        "interrupted": interrupted,
        "rows": [_row(entry, firsts.get(entry.peer.kind), bench) for entry in entries],
        "aa": _row(twin, original, bench),
    }


def _twin(peers: Sequence[Peer]) -> Peer:
    """Return the server that is entered twice: the first of ours, which starts fast, else the first."""
    return next((peer for peer in peers if peer.kind == OURS), peers[0])


def _prepare(entry: Entry, bench: Bench, say: Say) -> None:
    try:
        entry.peer.prepare(bench, say)
    except Exception as error:  # noqa: BLE001 - a server that cannot run here is a row that says why
        entry.error = error_text(error)
        say(f"{entry.peer.name}: cannot run here: {entry.error}")


def _turn(entry: Entry, bench: Bench, load: Load, asked: Check | None, turn: Take) -> None:
    try:
        entry.turns.append(turn(entry.peer, bench, load, asked))
    except Exception as error:  # noqa: BLE001 - likewise
        entry.error = error_text(error)


def _told(entry: Entry) -> str:
    if entry.error is not None:
        return f"failed: {entry.error}"
    last = entry.turns[-1]
    p95 = "no answer" if last.p95_ms is None else f"p95 {last.p95_ms:.0f} ms"
    return f"{last.per_second:.1f}/s, {p95}, {last.failed} failed, ready in {last.ready_s:.1f} s"


def _row(entry: Entry, first: Entry | None, bench: Bench) -> dict[str, Any]:
    peer, turns = entry.peer, entry.turns
    found = judge(entry.rates, first.rates) if first is not None else None
    threads = [turn.threads for turn in turns if turn.threads is not None]
    agrees = [turn.agreement for turn in turns if turn.agreement is not None]
    return {
        "server": peer.name,
        "class": peer.kind,
        "pattern": peer.pattern,
        "threads": threads[-1] if threads else peer.numbers.threads,
        "precision": peer.precision(bench),
        "batch": peer.numbers.batch,
        "workers": peer.numbers.workers,
        "delay_ms": peer.numbers.delay_ms,
        "per_second": entry.rates,
        "p95_ms": [turn.p95_ms for turn in turns],
        "compared_with": first.peer.name if first is not None else None,
        "ratio": found and round(found.ratio, 3),
        "interval": found and [round(found.low, 3), round(found.high, 3)],
        "verdict": found and found.word,
        "failed": sum(turn.failed for turn in turns),
        "restarts": sum(turn.restarts for turn in turns),
        "agreement": agrees[0] if agrees else None,
        "memory_mb": round(statistics.median(turn.memory_mb for turn in turns), 1) if turns else None,
        "ready_s": round(statistics.median(turn.ready_s for turn in turns), 1) if turns else None,
        "error": entry.error,
    }


def _unpack(archive: Path, folder: Path) -> ModelSpec:
    folder.mkdir()
    mar.unpack(archive, folder)
    return ModelSpec.load(folder)
