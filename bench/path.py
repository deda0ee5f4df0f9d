"""What the way around the model costs: the same handler with and without a server before it, in one run.

In turns: the server over HTTP, with many clients and with one; and as many worker processes as it has, with as many
threads, each given whole batches without a server. Run it as
`python -m bench.path --mar model_store/resnet18.mar --picture some.jpg --workers 2 --batch 16 --delay 1`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import machine
from bench.ladder.ladder import Worker
from bench.ladder.plan import Plan as Ladder
from bench.load import Plan, run
from bench.pictures import read
from bench.record import utc
from serve.addresses import Ports
from serve.config import Overrides
from serve.counts import choices
from serve.instance.child import Running
from serve.up import Request, up

_REPEATS = 9
_WARM_UP = 2.0


# One client and a lone worker take turns so often in each round, of about two seconds each: the machine's speed changes
# faster than rounds do. The worker's repeats are of single pictures, as the client's requests are.
_PAIRS = 12
_ONE_CLIENT_SECONDS, _ONE_CLIENT_WARM_UP = 2.0, 0.5
_LONE_REPEATS, _LONE_SECONDS = 40, 2.0


@dataclass(frozen=True)
class Lone:
    """Milliseconds of a lone picture over HTTP, and of decoding it and running the model without a server."""

    served_ms: float
    alone_ms: float


@dataclass(frozen=True)
class Turn:
    """One turn: pictures a second without and with a server, and a lone picture several times."""

    alone_per_second: float
    served_per_second: float
    served_p95_ms: float
    failed: int
    lone: tuple[Lone, ...]


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
        with _server(mar, Overrides(batch, workers, delay)) as running:
            state = running.state
            address = f"{state.inference}/predictions/{state.configuration['models'][0]['model']}"
            many = run(Plan(address, pictures, seconds=seconds, warm_up=_WARM_UP, clients=clients)).summary()
            (choice,) = choices(Path(state.environment["BEELINE_METRICS_DIR"])).values()
            threads, lone = threads_of(choice)
            plan = Ladder(mar, pictures, device="cpu", repeats=_REPEATS, threads=threads)
            singles, failed = _lone(address, plan, lone)
        turn = Turn(
            _alone(plan, workers, batch),
            many["good_per_second"],
            many["p95_ms"],
            many["failed"] + failed,
            tuple(singles),
        )
        found.append(turn)
        shown = ", ".join(f"{each.served_ms:.1f} beside {each.alone_ms:.1f}" for each in singles)
        typer.echo(
            f"  {turn.served_per_second:.1f} beside {turn.alone_per_second:.1f} requests/s; one client {shown} ms"
        )
    values = summary(found)
    typer.echo(
        f"{values['served_per_second']:.1f} requests/s over HTTP, {values['alone_per_second']:.1f} without a server: "
        f"{values['kept']:.1%}; one client waits {values['served_ms']:.1f} ms, decoding and the forward pass alone "
        f"take {values['alone_ms']:.1f}: {values['added_ms']:+.1f}; {values['failed']} failed"
    )
    if out is not None:
        asked = {"workers": workers, "batch": batch, "delay_ms": delay, "clients": clients, "rounds": rounds}
        about = {"at": utc(), "machine": machine.describe(), "pictures": pictures.to_dict(), "asked": asked}
        turns = {"turns": [dataclasses.asdict(turn) for turn in found]}
        out.write_text(json.dumps({**about, **values, **turns}, indent=2) + "\n", encoding="utf-8")


def summary(turns: list[Turn]) -> dict[str, Any]:
    """Return the medians, of ratios and differences too: turns of one round are near each other in time."""
    lone = [each for turn in turns for each in turn.lone]
    median = statistics.median
    return {
        "alone_per_second": round(median(turn.alone_per_second for turn in turns), 2),
        "served_per_second": round(median(turn.served_per_second for turn in turns), 2),
        "kept": round(median(turn.served_per_second / turn.alone_per_second for turn in turns), 3),
        "served_p95_ms": round(median(turn.served_p95_ms for turn in turns), 2),
        "alone_ms": round(median(each.alone_ms for each in lone), 2),
        "served_ms": round(median(each.served_ms for each in lone), 2),
        "added_ms": round(median(each.served_ms - each.alone_ms for each in lone), 2),
        "failed": sum(turn.failed for turn in turns),
    }


def threads_of(choice: Mapping[str, Mapping[str, str]]) -> tuple[int, int]:
    """Return the threads that a worker takes for a batch, and for a picture that comes alone.

    Args:
        choice: what the worker chose; engines that take as many for both have no `lone_threads`.
    """
    return int(choice["threads"]["value"]), int(choice.get("lone_threads", choice["threads"])["value"])


def _lone(address: str, plan: Ladder, threads: int) -> tuple[list[Lone], int]:
    """Return a lone picture's times, one client and a worker of its own in turns, and how many requests failed.

    Args:
        address: of the model on a server, which has nothing else to do.
        plan: of the worker.
        threads: of a lone picture.
    """
    plan = dataclasses.replace(plan, threads=threads, mix=1, repeats=_LONE_REPEATS, seconds=_LONE_SECONDS)
    pairs, failed = [], 0
    with Worker(plan) as worker:
        for _ in range(_PAIRS):
            asked = Plan(address, plan.pictures, seconds=_ONE_CLIENT_SECONDS, warm_up=_ONE_CLIENT_WARM_UP, clients=1)
            told = run(asked).summary()
            pairs.append(Lone(told["p50_ms"], worker.measure(1).per_image("decoded")))
            failed += told["failed"]
    return pairs, failed


def _alone(plan: Ladder, workers: int, batch: int) -> float:
    """Return the pictures a second of so many workers at the same time, in batches and without a server."""
    with ExitStack() as stack:
        loaded = [stack.enter_context(Worker(plan)) for _ in range(workers)]
        with ThreadPoolExecutor(workers) as pool:
            rows = list(pool.map(lambda worker: worker.measure(batch), loaded))
    return float(sum(1000 / row.per_image("handler") for row in rows))


@contextmanager
def _server(mar: Path, numbers: Overrides) -> Iterator[Running]:
    asked = Request(
        wanted=(str(mar.resolve()),),
        store=mar.resolve().parent,
        name="path",
        overrides=numbers,
        ports=Ports(0),
        gateway="none",
    )
    with (
        tempfile.TemporaryDirectory(prefix="beeline-path-") as state,
        up(asked, lambda line: None, {**os.environ, "BEELINE_STATE": state}) as running,
    ):
        yield running


if __name__ == "__main__":
    typer.run(main)
