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
from bench import load, sweep
from bench.pictures import read
from bench.studies import Clients, Mar, Out, Picture, Rounds, job, keep, served
from host.files import sha256
from serve import counts
from serve.config import Overrides

_WARM_UP = 2.0
# One client and a lone worker take turns so often in each round, of about two seconds each: the machine's speed changes
# faster than rounds do. The worker's repeats are of single pictures, as the client's requests are.
_PAIRS = 12
_ONE_CLIENT_SECONDS, _ONE_CLIENT_WARM_UP = 2.0, 0.5
_REPEATS, _LONE_REPEATS, _LONE_SECONDS = 9, 40, 2.0


def main(
    mar: Mar,
    picture: Picture,
    out: Out,
    workers: Annotated[int, typer.Option(help="Of both.")] = 2,
    batch: Annotated[int, typer.Option(help="Of both.")] = 16,
    delay: Annotated[int, typer.Option(help="Milliseconds, of the server.")] = 1,
    clients: Clients = 50,
    seconds: Annotated[float, typer.Option(help="Of load a turn.")] = 10.0,
    rounds: Rounds = 5,
) -> None:
    """Measure and print what the server keeps."""
    pictures = read(picture)
    numbers = {"workers": workers, "batch": batch, "delay_ms": delay, "clients": clients, "seconds": seconds}
    about = {"archive": sha256(mar), "pictures": pictures.to_dict(), "numbers": numbers}

    def measure() -> dict[str, Any]:
        with served(mar, Overrides(batch, workers, delay), "none") as (running, path):
            address = running.state.inference + path
            many = load.run(load.Plan(address, pictures, seconds, _WARM_UP, clients)).summary()
            (choice,) = counts.read(Path(running.state.environment[FOLDER])).choices().values()
            threads, lone = threads_of(choice)
            plan = sweep.Plan(mar, pictures, device="cpu", repeats=_REPEATS, threads=threads)
            pairs, failed = _lone(address, replace(plan, threads=lone))
        return {
            "alone_per_second": _alone(plan, workers, batch),
            "served_per_second": many["good_per_second"],
            "served_p95_ms": many["p95_ms"],
            "failed": many["failed"] + failed,
            "lone": pairs,
        }

    with job(out, about) as journal:
        turns = []
        for number in range(rounds):
            turns.append(journal.once(f"round {number}", measure))
            typer.echo(f"  {turns[-1]}")
        values = summary(turns)
        for name, value in values.items():
            typer.echo(f"{name.replace('_', ' ')}: {value}")
        keep(out, about, {**values, "turns": turns})


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians, of ratios and differences too: turns of one round are near each other in time.

    `kept` is the server's throughput over that without one; of a lone picture, `served_ms` is what one client waits,
    `alone_ms` what decoding and the forward pass alone take, and `added_ms` their difference.
    """
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


def _lone(address: str, plan: sweep.Plan) -> tuple[list[tuple[float, float]], int]:
    """Return a lone picture's milliseconds over HTTP and without a server, in turns, and how many requests failed."""
    plan = replace(plan, mix=1, repeats=_LONE_REPEATS, seconds=_LONE_SECONDS)
    client = load.Plan(address, plan.pictures, _ONE_CLIENT_SECONDS, _ONE_CLIENT_WARM_UP, clients=1)
    pairs, failed = [], 0
    with sweep.worker(plan) as (sandbox, _):
        for _ in range(_PAIRS):
            figures = load.run(client).summary()
            pairs.append((figures["p50_ms"], sweep.measure_batch(sandbox, plan, 1).per_image("decoded")))
            failed += figures["failed"]
    return pairs, failed


def _alone(plan: sweep.Plan, workers: int, batch: int) -> float:
    """Return the pictures a second of so many workers at the same time, in batches and without a server."""
    with ExitStack() as stack:
        sandboxes = [stack.enter_context(sweep.worker(plan))[0] for _ in range(workers)]
        with ThreadPoolExecutor(workers) as pool:
            rows = list(pool.map(lambda sandbox: sweep.measure_batch(sandbox, plan, batch), sandboxes))
    return float(sum(1000 / row.per_image("handler") for row in rows))


if __name__ == "__main__":
    typer.run(main)
