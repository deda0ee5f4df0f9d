"""What serving costs: HTTP and the gateway around the handler, and more clients than the server holds."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import psutil
import typer

from beeline.metrics import FOLDER
from bench import load, sweep
from bench.pictures import Pictures, read
from bench.record import machine, utc
from bench.studies import job
from host.files import sha256, write_json
from serve import counts
from serve.addresses import Ports
from serve.config import Overrides
from serve.instance.child import Running
from serve.status import status
from serve.up import Request, up

# All clients have the same address here, and the default rate limit is per address.
_NO_RATE = "beeline_requests_per_second=100000\n"
_CLIENTS, _SECONDS, _WARM_UP = 50, 10.0, 2.0
_PHASE = ("statuses", "errors", "good_per_second", "p50_ms", "p95_ms", "p99_ms", "without_retry_after")
Mar = Annotated[Path, typer.Option(help="The archive to serve.")]
Picture = Annotated[Path, typer.Option(help="What is sent.")]
Out = Annotated[Path, typer.Option(help="Write the figures here as JSON.")]
app = typer.Typer(help=__doc__, add_completion=False)


@app.command()
def overload(
    mar: Mar, picture: Picture, out: Out, seconds: Annotated[float, typer.Option(help="Length of each phase.")] = 60.0
) -> None:
    """Measure as many clients as the gateway admits, then four times as many, then the first number again.

    Each client asks again at once after an answer, and after a 429 when its Retry-After is over.
    """
    pictures, holds = read(picture), _CLIENTS
    about = {"archive": sha256(mar), "pictures": pictures.to_dict(), "holds": holds, "seconds": seconds}
    numbers = f"job_queue_size={holds}\n{_NO_RATE}"
    with job(out, about) as journal, served(mar, Overrides(8, 2, 2), numbers) as (running, route):
        plan = load.Plan(running.state.inference + route, pictures, seconds, 0, holds, heed_retry_after=True)
        phases = []
        for name, clients in (("as many as it holds", holds), ("overload", 4 * holds), ("afterwards", holds)):
            summary = journal.once(name, partial(_summary, replace(plan, clients=clients)))
            phases.append({"phase": name, "clients": clients, **{key: summary[key] for key in _PHASE}})
            typer.echo(json.dumps(phases[-1]))
        ratio, afterwards = (round(each["p95_ms"] / phases[0]["p95_ms"], 3) for each in phases[1:])
        typer.echo(f"p95 of the good answers under overload: {ratio} times that before; afterwards {afterwards} times")
        ratios = {"p95_ratio": ratio, "p95_ratio_afterwards": afterwards}
        write_json(out, {"at": utc(), "machine": machine(), **about, "phases": phases, **ratios})


@app.command()
def path(
    mar: Mar,
    picture: Picture,
    out: Out,
    workers: Annotated[int, typer.Option(help="Of the server, and without one.")] = 2,
    batch: Annotated[int, typer.Option(help="Of the server, and without one.")] = 16,
    rounds: Annotated[int, typer.Option(help="Turns of each.")] = 5,
) -> None:
    """Measure the server behind its gateway, the server alone with many clients and with one, and its handler alone.

    The handler alone runs in one process for each worker of the server, with as many threads, on whole batches.
    """
    pictures = read(picture)
    numbers = {"workers": workers, "batch": batch, "delay_ms": 1, "clients": _CLIENTS, "seconds": _SECONDS}
    about = {"archive": sha256(mar), "pictures": pictures.to_dict(), "numbers": numbers}
    with job(out, about) as journal:
        turns = []
        for number in range(rounds):
            turns.append(journal.once(f"round {number}", partial(_round, mar, pictures, workers, batch)))
            typer.echo(f"  {turns[-1]}")
        values = medians(turns)
        typer.echo(json.dumps(values, indent=1))
        write_json(out, {"at": utc(), "machine": machine(), **about, **values, "turns": turns})


def _round(mar: Path, pictures: Pictures, workers: int, batch: int) -> dict[str, Any]:
    """Return the figures of one round of `path`, which `medians` explains."""
    with served(mar, Overrides(batch, workers, 1)) as (running, route):
        address, loads, times = running.state.backend + route, [], [_cpu_seconds(running)]
        for url in (address, running.state.inference + route):
            loads.append(_summary(load.Plan(url, pictures, _SECONDS, _WARM_UP, _CLIENTS)))
            times.append(_cpu_seconds(running))
        (many, behind), (start, idle, end) = loads, times
        requests = behind["per_second"] * (_WARM_UP + _SECONDS)
        spent = {kind: 1000 * (end[kind] - idle[kind]) / requests for kind in ("server", "worker")}
        # Under the first load the gateway has no request, and what it takes is not the cost of requests.
        for kind in ("gateway", "nginx"):
            spent[kind] = 1000 * (end[kind] - 2 * idle[kind] + start[kind]) / requests
        size = mean(float(size) for size in Counter(behind["batch_sizes"]).elements())
        stages = {stage: behind["timing_ms"][stage] / size for stage in ("decode", "forward", "encode")}
        (choice,) = counts.read(Path(running.state.environment[FOLDER])).choices().values()
        # Some engines have one number for both, a batch and a picture alone.
        threads, lone = (int(choice.get(key, choice["threads"])["value"]) for key in ("threads", "lone_threads"))
        alone = sweep.Plan(mar, pictures, device="cpu", repeats=9, threads=threads)
        pairs, failed = _lone(address, replace(alone, threads=lone))
    return {
        "alone_per_second": _alone(alone, workers, batch),
        "served_per_second": many["good_per_second"],
        "served_p95_ms": many["p95_ms"],
        "gateway_per_second": behind["good_per_second"],
        "cpu_ms": {**spent, **stages, "protocol": spent["worker"] - sum(stages.values())},
        "failed": many["failed"] + behind["failed"] + failed,
        "lone": pairs,
    }


def _summary(plan: load.Plan) -> dict[str, Any]:
    return load.run(plan).summary()


@contextmanager
def served(mar: Path, numbers: Overrides, properties: str = _NO_RATE) -> Iterator[tuple[Running, str]]:
    """Serve one archive on free ports behind nginx; yield the server, and the path of its model's predictions."""
    with tempfile.TemporaryDirectory(prefix="beeline-study-") as folder:
        config = Path(folder) / "config.properties"
        config.write_text(properties, encoding="utf-8")
        place = mar.resolve()
        request = Request("torchserve", (str(place),), place.parent, config, "study", numbers, Ports(0), "nginx")
        with up(request, lambda line: None, {**os.environ, "BEELINE_STATE": folder}) as running:
            yield running, f"/predictions/{running.state.configuration['models'][0]['model']}"


def _cpu_seconds(running: Running) -> dict[str, float]:
    """Return the CPU seconds that the server's processes have used so far, by their kinds."""
    seconds: dict[str, float] = defaultdict(float)
    folder = running.instance.folder
    for each in status(folder.parent, folder.name)["servers"][0]["processes"]:
        seconds[each["kind"]] += sum(psutil.Process(each["pid"]).cpu_times()[:2])
    return seconds


def medians(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians, of ratios and differences too, because the turns of one round are near each other in time.

    `kept` is the server's throughput over that of its handler alone, `gateway_kept` that behind the gateway over the
    server's. `cpu_ms` is the CPU time of a request behind the gateway, by process; of a worker's, `decode`, `forward`
    and `encode` are a batch's milliseconds divided by its size, and `protocol` is the rest. Of a lone picture,
    `served_ms` is one client's latency, `alone_ms` the time of decoding and the forward pass, and `added_ms` their
    difference.
    """
    keys = ("alone_per_second", "served_per_second", "served_p95_ms", "gateway_per_second")
    served, alone = zip(*(pair for turn in turns for pair in turn["lone"]), strict=True)
    return {
        **{key: round(median(turn[key] for turn in turns), 3) for key in keys},
        "cpu_ms": {kind: round(median(turn["cpu_ms"][kind] for turn in turns), 3) for kind in turns[0]["cpu_ms"]},
        "kept": round(median(turn["served_per_second"] / turn["alone_per_second"] for turn in turns), 3),
        "gateway_kept": round(median(turn["gateway_per_second"] / turn["served_per_second"] for turn in turns), 3),
        "alone_ms": round(median(alone), 2),
        "served_ms": round(median(served), 2),
        "added_ms": round(median(over - pure for over, pure in zip(served, alone, strict=True)), 2),
        "failed": sum(turn["failed"] for turn in turns),
    }


def _lone(address: str, plan: sweep.Plan) -> tuple[list[tuple[float, float]], int]:
    """Return pairs of a lone picture's milliseconds, over HTTP and without a server, and how many requests failed."""
    # Single pictures, like the client's requests.
    plan = replace(plan, mix=1, repeats=40, seconds=2.0)
    client = load.Plan(address, plan.pictures, seconds=2.0, warm_up=0.5, clients=1)
    pairs, failed = [], 0
    with sweep.worker(plan) as (sandbox, _):
        # Pairs of two seconds each, because the machine's speed changes faster than rounds do.
        for _ in range(12):
            summary = _summary(client)
            pairs.append((summary["p50_ms"], sweep.measure_batch(sandbox, plan, 1)["decoded"]["ms_per_image"]))
            failed += summary["failed"]
    return pairs, failed


def _alone(plan: sweep.Plan, workers: int, batch: int) -> float:
    """Return the pictures a second of several workers at the same time, in batches and without a server."""
    with ExitStack() as stack:
        sandboxes = [stack.enter_context(sweep.worker(plan))[0] for _ in range(workers)]
        with ThreadPoolExecutor(workers) as pool:
            rows = list(pool.map(lambda sandbox: sweep.measure_batch(sandbox, plan, batch), sandboxes))
    return float(sum(1000 / row["handler"]["ms_per_image"] for row in rows))


if __name__ == "__main__":
    app()
