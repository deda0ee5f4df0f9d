"""Measurements that only we run: `python -m bench.studies.NAME --help`. Each is a job that goes on where it stopped."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.journal import Journal, state_folder
from bench.record import machine, utc
from host.files import write_json
from host.signals import Interrupted, as_exceptions
from serve.addresses import Ports
from serve.config import Overrides
from serve.instance.child import Running
from serve.up import Request, up

Out = Annotated[Path | None, typer.Option(help="Write the figures here as JSON. [default: below .beeline/bench]")]
Rounds = Annotated[int, typer.Option(help="Turns of each.")]
Clients = Annotated[int, typer.Option(help="Keep-alive clients.")]
Picture = Annotated[Path, typer.Option(help="What is sent.")]
Mar = Annotated[Path, typer.Option(help="The archive to serve.")]


@contextmanager
def job(name: str, out: Path | None, about: Mapping[str, Any]) -> Iterator[Journal]:
    """Yield the journal of a study; what the block adds to it as `result` becomes the file `out`.

    Interrupted, the same command goes on with what the journal has.
    """
    path = out or state_folder() / f"{name}.json"
    journal = Journal.job(path.with_suffix(".journal"), about)
    try:
        with as_exceptions():
            yield journal
    except Interrupted as interruption:
        typer.echo(f"interrupted ({interruption}); the same command goes on from there", err=True)
        raise typer.Exit(interruption.exit_code) from interruption
    write_json(path, {"at": utc(), "machine": machine(), **about, **journal.of("result")[-1]})
    journal.path.unlink()


@contextmanager
def served(
    mar: Path, numbers: Overrides, gateway: str, properties: str = "", store: Path | None = None
) -> Iterator[tuple[Running, str]]:
    """Serve one archive on free ports; yield the server, and the path of its model's predictions."""
    with tempfile.TemporaryDirectory(prefix="beeline-study-") as folder:
        config = Path(folder) / "config.properties"
        config.write_text(properties, encoding="utf-8")
        place = mar.resolve()
        request = Request(
            "torchserve", (str(place),), store or place.parent, config, "study", numbers, Ports(0), gateway
        )
        with up(request, lambda line: None, {**os.environ, "BEELINE_STATE": folder}) as running:
            yield running, f"/predictions/{running.state.configuration['models'][0]['model']}"


def in_turns(journal: Journal, measures: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """Return each one's values of so many rounds, each first in every other round; a first turn finds Java cold."""
    for measure in measures.values():
        measure()
    values: dict[str, list[Any]] = {name: [] for name in measures}
    for number in range(rounds):
        # What a turn leaves behind, warm or hot, is there for the second one of a pair.
        for name in sorted(measures, reverse=bool(number % 2)):
            values[name].append(journal.once(f"{name} {number}", measures[name]))
    return values


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Return where the median of what was drawn from lies with 95 % confidence, by rank: no shape is assumed.

    Args:
        ratios: sorted; of fewer than six nothing can be said with that confidence, so it lies anywhere.
    """
    count, cut, tail = len(ratios), 0, 0.5 ** len(ratios)
    while 2 * (tail + math.comb(count, cut + 1) * 0.5**count) <= 0.05:
        cut += 1
        tail += math.comb(count, cut) * 0.5**count
    return (ratios[cut], ratios[-1 - cut]) if 2 * tail <= 0.05 else (-math.inf, math.inf)
