"""What the way around the model costs: the same handler with and without a server before it, in one run.

In turns: as many worker processes as the server has, each given whole batches without a server; and the server over
HTTP, with many clients and with one. Run it as
`python -m bench.path --mar model_store/resnet18.mar --picture some.jpg --workers 2 --batch 16 --delay 1`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import machine
from bench.compare.own import Up
from bench.ladder.plan import Plan as Ladder
from bench.ladder.process import Worker
from bench.load.plan import Plan
from bench.load.run import run
from bench.pictures import Pictures, read
from bench.record import utc
from serve.addresses import Ports
from serve.config import LONE, Overrides
from serve.machine import cores
from serve.up import Request, up

_REPEATS = 9
_WARM_UP = 2.0


@dataclass(frozen=True)
class Turn:
    """One turn: pictures a second without and with a server, and a lone picture's ms without and with one."""

    alone_per_second: float
    served_per_second: float
    alone_ms: float
    served_ms: float
    served_p95_ms: float
    failed: int


def main(
    mar: Annotated[Path, typer.Option(help="The archive.")],
    picture: Annotated[Path, typer.Option(help="What is sent.")],
    workers: Annotated[int, typer.Option(help="Of both.")] = 2,
    batch: Annotated[int, typer.Option(help="Of both.")] = 16,
    delay: Annotated[int, typer.Option(help="Milliseconds, of the server.")] = 1,
    clients: Annotated[int, typer.Option(help="Keep-alive clients.")] = 50,
    seconds: Annotated[float, typer.Option(help="Of load a turn.")] = 10.0,
    rounds: Annotated[int, typer.Option(help="Turns of each.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
) -> None:
    """Measure and print what the server keeps."""
    pictures = read(picture)
    found = []
    for _ in range(rounds):
        model, alone_per_second, alone_ms = _alone(mar, pictures, workers, batch)
        with _server(mar, Overrides(batch, workers, delay)) as started:
            address = f"{started.url}/predictions/{model}"
            many = run(Plan(address, pictures, seconds=seconds, warm_up=_WARM_UP, clients=clients)).summary()
            one = run(Plan(address, pictures, seconds=seconds / 2, warm_up=_WARM_UP, clients=1)).summary()
        found.append(
            Turn(
                alone_per_second,
                many["good_per_second"],
                alone_ms,
                one["p50_ms"],
                many["p95_ms"],
                many["failed"] + one["failed"],
            )
        )
        typer.echo(f"  {found[-1]}")
    values = summary(found)
    typer.echo(
        f"{values['served_per_second']:.1f} requests/s over HTTP, {values['alone_per_second']:.1f} without a server: "
        f"{values['kept']:.1%}; one client waits {values['served_ms']:.1f} ms, decoding and the forward pass alone "
        f"take {values['alone_ms']:.1f}: {values['added_ms']:+.1f}; {values['failed']} failed"
    )
    if out is not None:
        asked = {"workers": workers, "batch": batch, "delay_ms": delay, "clients": clients, "rounds": rounds}
        about = {"at": utc(), "machine": machine.describe(), "pictures": pictures.to_dict(), "asked": asked}
        out.write_text(json.dumps({**about, **values}, indent=2) + "\n", encoding="utf-8")


def summary(turns: list[Turn]) -> dict[str, Any]:
    """Return the medians, of ratios and differences too: turns of one round are near each other in time."""
    median = {name: round(statistics.median(getattr(turn, name) for turn in turns), 2) for name in vars(turns[0])}
    kept = statistics.median(turn.served_per_second / turn.alone_per_second for turn in turns)
    added = statistics.median(turn.served_ms - turn.alone_ms for turn in turns)
    failed = sum(turn.failed for turn in turns)
    return {**median, "failed": failed, "kept": round(kept, 3), "added_ms": round(added, 2)}


def _alone(mar: Path, pictures: Pictures, workers: int, batch: int) -> tuple[str, float, float]:
    """Return the model's name, pictures a second of all workers, and one worker's milliseconds for a single one."""
    plan = Ladder(mar, pictures, device="cpu", repeats=_REPEATS)
    with ExitStack() as stack:
        loaded = [stack.enter_context(Worker(plan)) for _ in range(workers)]
        with ThreadPoolExecutor(workers) as pool:
            rows = list(pool.map(lambda worker: worker.measure(batch), loaded))
    about = loaded[0].about
    # With the threads that a lone picture gets of the server too.
    threads = min(cores(), LONE) if about["choice"]["engine"][0] == "openvino" else plan.threads
    with Worker(dataclasses.replace(plan, threads=threads)) as worker:
        lone = worker.measure(1)
    return about["model"], sum(1000 / row.per_image("handler") for row in rows), lone.per_image("decoded")


def _server(mar: Path, numbers: Overrides) -> Up:
    state = Path(tempfile.mkdtemp(prefix="beeline-path-"))
    asked = Request(
        wanted=(str(mar.resolve()),),
        store=mar.resolve().parent,
        name="path",
        overrides=numbers,
        ports=Ports(0),
        gateway="none",
    )
    return Up(up(asked, lambda line: None, {**os.environ, "BEELINE_STATE": str(state)}), state)


if __name__ == "__main__":
    typer.run(main)
