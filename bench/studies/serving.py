"""What serving costs: the gateway, a container, more clients than the server holds, HTTP around the handler.

Each study compares in turns, in one run. They need nginx, ApacheBench (Debian: apache2-utils) and, for `container`,
Docker.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import copyfile
from typing import Annotated, Any

import psutil
import typer

from archive import mar as archives
from archive import store
from beeline.errors import Undetermined
from beeline.metrics import FOLDER
from bench import load, sweep
from bench.load.crosscheck import ab
from bench.pictures import read
from bench.record import Journal, interval
from bench.studies import Out, Rounds, job, keep
from host.files import sha256
from serve import counts
from serve.addresses import Ports
from serve.client import InferenceClient
from serve.config import Overrides
from serve.instance.child import Running
from serve.up import Request, up

# As in docker-compose.yml.
CONFINED = ("--read-only", "--tmpfs", "/tmp:size=1g", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
_IMAGE = "beeline-cpu:0.1.0"
# All clients have the same address here, and the default rate limit is per address.
_NO_RATE = "beeline_requests_per_second=100000\n"
_NO_OP = """
class NoOp:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        return ["{}"] * len(data)
"""
_CLIENTS = 50
_FIGURES = ("statuses", "errors", "good_per_second", "p50_ms", "p95_ms", "p99_ms", "without_retry_after")
# Of `path`: milliseconds, and seconds of load a turn.
_DELAY, _SECONDS = 1, 10.0
Mar = Annotated[Path, typer.Option(help="The archive to serve.")]
Picture = Annotated[Path, typer.Option(help="What is sent.")]
Requests = Annotated[int, typer.Option(help="Requests a turn.")]
app = typer.Typer(help=__doc__, add_completion=False)


@app.command()
def gateway(picture: Picture, out: Out, rounds: Rounds = 7, requests: Requests = 6000) -> None:
    """Measure the gateway's CPU time a request, and throughput behind it and without it; the model does nothing."""
    about = {"picture_bytes": picture.stat().st_size, "clients": _CLIENTS, "requests": requests}
    with job(out, about) as journal, ExitStack() as stack:
        mar = no_op(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="noop-"))) / "noop.mar")
        running, route = stack.enter_context(served(mar, Overrides(16, 1, 1), "nginx", _NO_RATE))
        urls = {"server": running.state.backend + route, "gateway": running.state.inference + route}
        keep(out, about, in_turns(journal, urls, running, picture.read_bytes(), rounds, requests))


@app.command()
def container(mar: Mar, picture: Picture, out: Out, rounds: Rounds = 7, requests: Requests = 400) -> None:
    """Measure throughput in a container and under bare `serve up`; the image has Pillow-SIMD."""
    numbers, body = {"BATCH_SIZE": "16", "WORKERS": "2", "LINGER_MS": "5"}, picture.read_bytes()
    about = {"archive": sha256(mar), "numbers": numbers, "picture_bytes": len(body), "image": _IMAGE}
    about |= {"clients": _CLIENTS, "requests": requests}
    with job(out, about) as journal, ExitStack() as stack:
        # A store with this archive alone, because a container serves everything in its store's index.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="container-"))) / "store"
        # The container's user must be able to read it.
        folder.mkdir(mode=0o755)
        copyfile(mar, folder / "draft")
        store.put(folder, folder / "draft", mar.name, store.read_index(mar.parent)[mar.name])
        options = (*(f"--env={name}={value}" for name, value in numbers.items()), f"--volume={folder}:/model_store:ro")
        started = _docker("run", "--detach", *CONFINED, *options, "--publish=127.0.0.1::8080", _IMAGE)
        stack.callback(_docker, "rm", "--force", started)
        running, route = stack.enter_context(served(folder / mar.name, Overrides(16, 2, 5), "nginx"))
        inside = f"http://{_docker('port', started, '8080')}"
        with InferenceClient(inside) as client:
            client.predict(Path(route).name, body)
        urls = {"bare": running.state.inference + route, "container": inside + route}
        keep(out, about, in_turns(journal, urls, running, body, rounds, requests))


@app.command()
def overload(
    mar: Mar, picture: Picture, out: Out, seconds: Annotated[float, typer.Option(help="Length of each phase.")] = 60.0
) -> None:
    """Measure as many clients as the gateway admits, then four times as many, then the first again.

    Each client asks again at once after an answer, and after a 429 when its Retry-After is over.
    """
    pictures, holds = read(picture), _CLIENTS
    about = {"archive": sha256(mar), "pictures": pictures.to_dict(), "holds": holds, "seconds": seconds}
    numbers = f"job_queue_size={holds}\n{_NO_RATE}"
    with job(out, about) as journal, served(mar, Overrides(8, 2, 2), "nginx", numbers) as (running, route):
        plan = load.Plan(running.state.inference + route, pictures, seconds, warm_up=0, clients=holds)
        phases = []
        for name, clients in (("as many as it holds", holds), ("overload", 4 * holds), ("afterwards", holds)):
            phase = partial(_summary, replace(plan, clients=clients, heed_retry_after=True))
            summary = journal.once(name, phase)
            phases.append({"phase": name, "clients": clients, **{key: summary[key] for key in _FIGURES}})
            typer.echo(json.dumps(phases[-1]))
        ratio, afterwards = (round(each["p95_ms"] / phases[0]["p95_ms"], 3) for each in phases[1:])
        typer.echo(f"p95 of the good answers under overload: {ratio} times that before; afterwards {afterwards} times")
        keep(out, about, {"phases": phases, "p95_ratio": ratio, "p95_ratio_afterwards": afterwards})


@app.command()
def path(
    mar: Mar,
    picture: Picture,
    out: Out,
    workers: Annotated[int, typer.Option(help="Of the server, and without one.")] = 2,
    batch: Annotated[int, typer.Option(help="Of the server, and without one.")] = 16,
    rounds: Rounds = 5,
) -> None:
    """Measure the server over HTTP, with many clients and with one, and the same handler without a server.

    Without a server, as many processes with as many threads are given whole batches.
    """
    pictures = read(picture)
    numbers = {"workers": workers, "batch": batch, "delay_ms": _DELAY, "clients": _CLIENTS, "seconds": _SECONDS}
    about = {"archive": sha256(mar), "pictures": pictures.to_dict(), "numbers": numbers}

    def measure() -> dict[str, Any]:
        with served(mar, Overrides(batch, workers, _DELAY), "none") as (running, route):
            address = running.state.inference + route
            many = _summary(load.Plan(address, pictures, _SECONDS, clients=_CLIENTS))
            (choice,) = counts.read(Path(running.state.environment[FOLDER])).choices().values()
            # Some engines have one number for both, a batch and a picture alone.
            threads, lone = (int(choice.get(key, choice["threads"])["value"]) for key in ("threads", "lone_threads"))
            plan = sweep.Plan(mar, pictures, device="cpu", repeats=9, threads=threads)
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
        values = medians(turns)
        typer.echo(json.dumps(values, indent=1))
        keep(out, about, {**values, "turns": turns})


def _summary(plan: load.Plan) -> dict[str, Any]:
    return load.run(plan).summary()


@contextmanager
def served(mar: Path, numbers: Overrides, gateway: str, properties: str = "") -> Iterator[tuple[Running, str]]:
    """Serve one archive on free ports; yield the server, and the path of its model's predictions."""
    with tempfile.TemporaryDirectory(prefix="beeline-study-") as folder:
        config = Path(folder) / "config.properties"
        config.write_text(properties, encoding="utf-8")
        place = mar.resolve()
        request = Request("torchserve", (str(place),), place.parent, config, "study", numbers, Ports(0), gateway)
        with up(request, lambda line: None, {**os.environ, "BEELINE_STATE": folder}) as running:
            yield running, f"/predictions/{running.state.configuration['models'][0]['model']}"


def in_turns(
    journal: Journal, urls: Mapping[str, str], running: Running, body: bytes, rounds: int, requests: int
) -> dict[str, Any]:
    """Measure two addresses in turns, each first in every other round, and return `ratios_of` the rounds.

    Raise `Undetermined` when a request failed.
    """

    def turn(url: str) -> dict[str, float]:
        before = _cpu_seconds(running)
        per_second, failed = ab(url, body, requests, _CLIENTS)
        if failed:
            raise Undetermined(f"{failed} of {requests} requests failed, so this is no measurement")
        return {"per_second": per_second, "gateway_cpu_ms": 1000 * (_cpu_seconds(running) - before) / requests}

    for url in urls.values():
        # In a first turn Java is cold.
        turn(url)
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in urls}
    for number in range(rounds):
        # The second turn of a pair finds what the first one left, such as warm caches or a hot processor.
        for name in sorted(urls, reverse=bool(number % 2)):
            turns[name].append(journal.once(f"{name} {number}", partial(turn, urls[name])))
    return ratios_of(turns)


def ratios_of(turns: Mapping[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Print and return the figures of two addresses, from their turns by name.

    Returns:
        The `ratio` of the second address to the first, its median, the `ratios` of all rounds and their `interval`;
        medians of answers a second and of the gateway's CPU milliseconds a request by name; all `rounds`.
    """
    first, second = ([turn["per_second"] for turn in own] for own in turns.values())
    ratios = sorted(other / one for one, other in zip(first, second, strict=True))
    values: dict[str, Any] = {"ratio": statistics.median(ratios), "ratios": ratios, "interval": interval(ratios)}
    for key in ("per_second", "gateway_cpu_ms"):
        values[key] = {name: statistics.median(turn[key] for turn in own) for name, own in turns.items()}
    typer.echo(json.dumps(values, indent=1))
    return {**values, "rounds": turns}


def no_op(path: Path) -> Path:
    """Write the archive of a model that does nothing."""
    model = {"modelName": "noop", "serializedFile": "none.pt", "handler": "noop.py", "modelVersion": "1.0"}
    manifest = {"createdOn": "01/01/1980 00:00:00", "runtime": "python", "model": model, "archiverVersion": "0.12.0"}
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(archives.MANIFEST, json.dumps(manifest))
        file.writestr("noop.py", _NO_OP)
        file.writestr("none.pt", b"")
    return path


def _cpu_seconds(running: Running) -> float:
    """Return the CPU seconds that the gateway, nginx included, has used so far."""
    state = running.instance.read()
    assert state is not None
    gateway = psutil.Process(state.gateway_process)
    times = (each.cpu_times() for each in (gateway, *gateway.children(recursive=True)))
    return sum(each.user + each.system for each in times)


def _docker(*words: str) -> str:
    try:
        return subprocess.run(["docker", *words], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise Undetermined(f"docker {' '.join(words)}: {getattr(error, 'stderr', '') or error}") from error


def medians(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians, of ratios and differences too, because the turns of one round are near each other in time.

    `kept` is the server's throughput over that without one. Of a lone picture, `served_ms` is one client's latency,
    `alone_ms` the time of decoding and the forward pass, and `added_ms` their difference.
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
