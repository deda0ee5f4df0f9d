"""What the way around the model costs: the same handler with and without a server before it, in one run.

In turns: the server over HTTP, with many clients and with one; and as many worker processes as it has, with as many
threads, each given whole batches without a server.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from beeline.metrics import FOLDER
from bench.load import Plan, run
from bench.pictures import read
from bench.studies import Clients, Mar, Out, Picture, Rounds, job, served
from bench.sweep import Plan as Sweep
from bench.sweep import TimedSandbox
from host.files import sha256
from serve import counts
from serve.config import Overrides

_REPEATS, _WARM_UP = 9, 2.0
# One client and a lone worker take turns so often in each round, of about two seconds each: the machine's speed changes
# faster than rounds do. The worker's repeats are of single pictures, as the client's requests are.
_PAIRS = 12
_ONE_CLIENT_SECONDS, _ONE_CLIENT_WARM_UP = 2.0, 0.5
_LONE_REPEATS, _LONE_SECONDS = 40, 2.0


def main(
    mar: Mar,
    picture: Picture,
    workers: Annotated[int, typer.Option(help="Of both.")] = 2,
    batch: Annotated[int, typer.Option(help="Of both.")] = 16,
    delay: Annotated[int, typer.Option(help="Milliseconds, of the server.")] = 1,
    clients: Clients = 50,
    seconds: Annotated[float, typer.Option(help="Of load a turn.")] = 10.0,
    rounds: Rounds = 5,
    out: Out = None,
) -> None:
    """Measure and print what the server keeps."""
    pictures = read(picture)
    numbers = {"workers": workers, "batch": batch, "delay_ms": delay, "clients": clients, "seconds": seconds}
    about = {"archive": sha256(mar), "pictures": pictures.to_dict(), "numbers": numbers}

    def measure() -> dict[str, Any]:
        with served(mar, Overrides(batch, workers, delay), "none") as (running, path):
            address = running.state.inference + path
            many = run(Plan(address, pictures, seconds, _WARM_UP, clients)).summary()
            (choice,) = counts.read(Path(running.state.environment[FOLDER])).choices().values()
            threads, lone = threads_of(choice)
            plan = Sweep(mar, pictures, device="cpu", repeats=_REPEATS, threads=threads)
            pairs, failed = _lone(address, replace(plan, threads=lone))
        return {
            "alone_per_second": _alone(plan, workers, batch),
            "served_per_second": many["good_per_second"],
            "served_p95_ms": many["p95_ms"],
            "failed": many["failed"] + failed,
            "lone": pairs,
        }

    with job("path", out, about) as journal:
        turns = []
        for number in range(rounds):
            turns.append(journal.once(f"round {number}", measure))
            typer.echo(f"  {turns[-1]}")
        values = summary(turns)
        typer.echo(
            f"{values['served_per_second']:.1f} requests/s over HTTP, {values['alone_per_second']:.1f} without a "
            f"server: {values['kept']:.1%}; one client waits {values['served_ms']:.1f} ms, decoding and the forward "
            f"pass alone take {values['alone_ms']:.1f}: {values['added_ms']:+.1f}; {values['failed']} failed"
        )
        journal.add("result", {**values, "turns": turns})


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians, of ratios and differences too: turns of one round are near each other in time."""
    served, alone = zip(*(pair for turn in turns for pair in turn["lone"]), strict=True)
    median, keys = statistics.median, ("alone_per_second", "served_per_second", "served_p95_ms")
    return {
        **{key: round(median(turn[key] for turn in turns), 2) for key in keys},
        "kept": round(median(turn["served_per_second"] / turn["alone_per_second"] for turn in turns), 3),
        "alone_ms": round(median(alone), 2),
        "served_ms": round(median(served), 2),
        "added_ms": round(median(over - pure for over, pure in zip(served, alone, strict=True)), 2),
        "failed": sum(turn["failed"] for turn in turns),
    }


def threads_of(choice: Mapping[str, Mapping[str, str]]) -> tuple[int, int]:
    """Return the threads that a worker chose for a batch, and for a picture alone; some engines have one number."""
    return int(choice["threads"]["value"]), int(choice.get("lone_threads", choice["threads"])["value"])


def _lone(address: str, plan: Sweep) -> tuple[list[tuple[float, float]], int]:
    """Return a lone picture's milliseconds over HTTP and without a server, in turns, and how many requests failed."""
    plan = replace(plan, mix=1, repeats=_LONE_REPEATS, seconds=_LONE_SECONDS)
    pairs, failed = [], 0
    with TimedSandbox(plan) as worker:
        for _ in range(_PAIRS):
            load = run(Plan(address, plan.pictures, _ONE_CLIENT_SECONDS, _ONE_CLIENT_WARM_UP, clients=1)).summary()
            pairs.append((load["p50_ms"], worker.measure(1).per_image("decoded")))
            failed += load["failed"]
    return pairs, failed


def _alone(plan: Sweep, workers: int, batch: int) -> float:
    """Return the pictures a second of so many workers at the same time, in batches and without a server."""
    with ExitStack() as stack:
        loaded = [stack.enter_context(TimedSandbox(plan)) for _ in range(workers)]
        with ThreadPoolExecutor(workers) as pool:
            rows = list(pool.map(lambda worker: worker.measure(batch), loaded))
    return float(sum(1000 / row.per_image("handler") for row in rows))


if __name__ == "__main__":
    typer.run(main)
