"""What the gateway costs: CPU time a request, and throughput with and without it, in one run.

A no-op model on real TorchServe, so that nothing hides the cost. `ab` asks the server itself and the gateway before it
in turns; the gateway's CPU time is what its processes used meanwhile. Needs nginx and ab (Debian: apache2-utils).
"""

from __future__ import annotations

import json
import statistics
import tempfile
import zipfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from bench.load.crosscheck import ab
from bench.studies import Clients, Out, Picture, Rounds, in_turns, job, served
from host import processes
from serve.config import Overrides
from serve.instance.child import Running

_HANDLER = """
class NoOp:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        return ["{}"] * len(data)
"""


def main(
    picture: Picture,
    rounds: Rounds = 7,
    requests: Annotated[int, typer.Option(help="Requests a turn.")] = 6000,
    clients: Clients = 50,
    out: Out = None,
) -> None:
    """Measure and print a table."""
    about = {"picture_bytes": picture.stat().st_size, "clients": clients, "requests": requests}
    # All clients share one address here, which the default rate would hold back.
    numbers = "beeline_requests_per_second=100000\n"
    with job("gateway", out, about) as journal, tempfile.TemporaryDirectory(prefix="noop-") as folder:
        mar = archive(Path(folder) / "noop.mar")
        with served(mar, Overrides(16, 1, 1), "nginx", numbers) as (running, path):

            def turn(url: str) -> dict[str, float]:
                before = _cpu_seconds(running)
                measured = ab(url + path, picture, requests, clients)
                cpu = 1000 * (_cpu_seconds(running) - before) / requests
                return {"per_second": measured.per_second, "failed": measured.failed, "gateway_cpu_ms": cpu}

            targets = {"server": running.state.backend, "gateway": running.state.inference}
            turns = in_turns(journal, {key: partial(turn, url) for key, url in targets.items()}, rounds)
        values = summary(turns["server"], turns["gateway"])
        typer.echo(json.dumps(values, indent=1))
        journal.add("result", {**values, "rounds": turns})


def summary(server: list[dict[str, float]], gateway: list[dict[str, float]]) -> dict[str, Any]:
    """Return medians, and the ratio of each pair of turns."""
    ratios = sorted(behind["per_second"] / alone["per_second"] for alone, behind in zip(server, gateway, strict=True))
    return {
        "server_per_second": statistics.median(turn["per_second"] for turn in server),
        "gateway_per_second": statistics.median(turn["per_second"] for turn in gateway),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "failed": sum(turn["failed"] for turn in (*server, *gateway)),
        "gateway_cpu_ms_a_request": statistics.median(turn["gateway_cpu_ms"] for turn in gateway),
    }


def _cpu_seconds(running: Running) -> float:
    """Return the CPU seconds that nginx and the prober have used so far."""
    state = running.instance.read()
    assert state is not None
    marked = processes.marked("no such variable", "-", Path(state.temporary) / "gateway")
    ids = {each.pid for each in marked} | {state.gateway_process}
    times = (psutil.Process(pid).cpu_times() for pid in ids if pid is not None)
    return sum(each.user + each.system for each in times)


def archive(path: Path) -> Path:
    """Write the archive of a model that does nothing."""
    model = {"modelName": "noop", "serializedFile": "none.pt", "handler": "noop.py", "modelVersion": "1.0"}
    manifest = {"createdOn": "01/01/2000 00:00:00", "runtime": "python", "model": model, "archiverVersion": "0.12.0"}
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        file.writestr("noop.py", _HANDLER)
        file.writestr("none.pt", b"")
    return path


if __name__ == "__main__":
    typer.run(main)
