"""What the gateway costs, and what a container costs: in turns with the same server without it, both asked by `ab`.

`gateway` serves a no-op model, so that nothing hides the cost. `container` serves the same archive with the same
numbers in the CPU image (docker-compose.yml) and under bare `serve up`; the image has Pillow-SIMD. Needs nginx, `ab`
(Debian: apache2-utils) and, for the second, a container engine.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from shutil import copyfile
from typing import Annotated, Any

import psutil
import typer

from archive import store
from beeline.errors import Undetermined
from bench.load.crosscheck import ab
from bench.record import Journal, interval
from bench.studies import Clients, Mar, Out, Picture, Rounds, job, keep, served
from host import processes
from host.files import sha256
from serve.client import InferenceClient
from serve.config import Overrides
from serve.instance.child import Running

# As docker-compose.yml confines it.
CONFINED = ("--read-only", "--tmpfs", "/tmp:size=1g", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
# All clients share one address here, which the default rate would hold back.
_PROPERTIES = "beeline_requests_per_second=100000\n"
_HANDLER = """
class NoOp:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        return ["{}"] * len(data)
"""
Requests = Annotated[int, typer.Option(help="Requests a turn.")]
app = typer.Typer(help=__doc__, add_completion=False)


@app.command()
def gateway(picture: Picture, out: Out, rounds: Rounds = 7, requests: Requests = 6000, clients: Clients = 50) -> None:
    """Measure the CPU time that the gateway takes for a request, and throughput behind it and without it."""
    about = {"picture_bytes": picture.stat().st_size, "clients": clients, "requests": requests}
    with job(out, about) as journal, ExitStack() as stack:
        mar = no_op(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="noop-"))) / "noop.mar")
        running, path = stack.enter_context(served(mar, Overrides(16, 1, 1), "nginx", _PROPERTIES))
        urls = {"server": running.state.backend + path, "gateway": running.state.inference + path}
        keep(out, about, in_turns(journal, urls, running, picture.read_bytes(), rounds, requests, clients))


@app.command()
def container(
    mar: Mar,
    picture: Picture,
    out: Out,
    image: Annotated[str, typer.Option(help="The CPU image.")] = "beeline-cpu:0.1.0",
    rounds: Rounds = 7,
    requests: Requests = 400,
    clients: Clients = 50,
) -> None:
    """Measure throughput in a container and under bare `serve up`."""
    numbers, body = {"BATCH_SIZE": "16", "WORKERS": "2", "LINGER_MS": "5"}, picture.read_bytes()
    about = {"archive": sha256(mar), "numbers": numbers, "picture_bytes": len(body), "image": image}
    about |= {"clients": clients, "requests": requests}
    with job(out, about) as journal, ExitStack() as stack:
        # A store of this archive alone: a container serves all that its index lists, as a user who may read it.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="container-"))) / "store"
        folder.mkdir(mode=0o755)
        copyfile(mar, folder / "draft")
        store.put(folder, folder / "draft", mar.name, store.read_index(mar.parent)[mar.name])
        options = (*(f"--env={name}={value}" for name, value in numbers.items()), f"--volume={folder}:/model_store:ro")
        started = _docker("run", "--detach", *CONFINED, *options, "--publish=127.0.0.1::8080", image)
        stack.callback(_docker, "rm", "--force", started)
        running, path = stack.enter_context(served(folder / mar.name, Overrides(16, 2, 5), "nginx"))
        inside = f"http://{_docker('port', started, '8080')}"
        with InferenceClient(inside) as client:
            client.predict(Path(path).name, body)
        urls = {"bare": running.state.inference + path, "container": inside + path}
        keep(out, about, in_turns(journal, urls, running, body, rounds, requests, clients))


def in_turns(
    journal: Journal, urls: Mapping[str, str], running: Running, body: bytes, rounds: int, requests: int, clients: int
) -> dict[str, Any]:
    """Ask two addresses in turns; each is the first in every other round, after a turn that finds Java cold.

    Returns:
        Medians of answers a second and of the gateway's CPU milliseconds a request by name; the ratio of the second
        address to the first, its median, each and its interval; all rounds.

    Raises:
        Undetermined: when a request failed.
    """

    def turn(url: str) -> dict[str, float]:
        before = _cpu_seconds(running)
        per_second, failed = ab(url, body, requests, clients)
        if failed:
            raise Undetermined(f"{failed} of {requests} requests failed, so this is no measurement")
        return {"per_second": per_second, "gateway_cpu_ms": 1000 * (_cpu_seconds(running) - before) / requests}

    for url in urls.values():
        turn(url)
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in urls}
    for number in range(rounds):
        # What a turn leaves behind, warm or hot, is there for the second one of a pair.
        for name in sorted(urls, reverse=bool(number % 2)):
            turns[name].append(journal.once(f"{name} {number}", partial(turn, urls[name])))
    return summary(turns)


def summary(turns: Mapping[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return what `in_turns` does, of the rounds of two addresses by name."""
    first, second = ([turn["per_second"] for turn in own] for own in turns.values())
    ratios = sorted(other / one for one, other in zip(first, second, strict=True))
    values: dict[str, Any] = {"ratio": statistics.median(ratios), "ratios": ratios, "interval": interval(ratios)}
    for name, own in turns.items():
        values[f"{name}_per_second"] = statistics.median(turn["per_second"] for turn in own)
        values[f"{name}_gateway_cpu_ms"] = statistics.median(turn["gateway_cpu_ms"] for turn in own)
    typer.echo(json.dumps(values, indent=1))
    return {**values, "rounds": turns}


def no_op(path: Path) -> Path:
    """Write the archive of a model that does nothing."""
    model = {"modelName": "noop", "serializedFile": "none.pt", "handler": "noop.py", "modelVersion": "1.0"}
    manifest = {"createdOn": "01/01/2000 00:00:00", "runtime": "python", "model": model, "archiverVersion": "0.12.0"}
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        file.writestr("noop.py", _HANDLER)
        file.writestr("none.pt", b"")
    return path


def _cpu_seconds(running: Running) -> float:
    """Return the CPU seconds that nginx and the prober have used so far."""
    state = running.instance.read()
    assert state is not None
    marked = processes.marked("no such variable", "-", Path(state.temporary) / "gateway")
    ids = {each.pid for each in marked} | {state.gateway_process}
    times = (psutil.Process(pid).cpu_times() for pid in ids if pid is not None)
    return sum(each.user + each.system for each in times)


def _docker(*words: str) -> str:
    try:
        return subprocess.run(["docker", *words], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise Undetermined(f"docker {' '.join(words)}: {getattr(error, 'stderr', '') or error}") from error


if __name__ == "__main__":
    app()
