"""What the gateway costs: CPU time a request, and throughput with and without it, in one run.

A no-op model on real TorchServe, so that nothing hides the cost. `ab` asks the server itself and the gateway
before it in turns, each first in every other pair, after a turn of each that does not count; the gateway's CPU
time is what its processes used meanwhile. Run it as
`python -m bench.gateway --picture some.jpg`; needs nginx and ab (Debian: nginx, apache2-utils).
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import psutil
import typer

from bench import machine
from bench.load.crosscheck import ab
from host import processes
from host.machine import cores
from serve.addresses import Ports
from serve.config import Overrides
from serve.instance.child import Running
from serve.up import Request, up

_HANDLER = """
class NoOp:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        return ["{}"] * len(data)
"""
# What a model is to serve on two cores; the share of it that the gateway takes is reported.
_GOAL = 330


@dataclass(frozen=True)
class Round:
    """One turn of `ab` at one address: requests a second, failures, milliseconds of CPU a request (nginx)."""

    target: str
    per_second: float
    failed: int
    gateway_cpu_ms: float


def main(
    picture: Annotated[Path, typer.Option(help="What is sent.")],
    rounds: Annotated[int, typer.Option(help="Turns of each.")] = 7,
    requests: Annotated[int, typer.Option(help="Requests a turn.")] = 6000,
    clients: Annotated[int, typer.Option(help="Keep-alive clients.")] = 50,
    out: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
) -> None:
    """Measure and print a table."""
    with tempfile.TemporaryDirectory(prefix="noop-") as folder:
        mar = _archive(Path(folder) / "noop.mar")
        # All clients share one address here, which the default rate would hold back.
        numbers = mar.with_name("config.properties")
        numbers.write_text("beeline_requests_per_second=100000\n", encoding="utf-8")
        asked = Request(
            wanted=(str(mar),),
            store=mar.parent,
            config_file=numbers,
            name="bench-gateway",
            overrides=Overrides(batch_size=16, workers=1, max_batch_delay=1),
            ports=Ports(0),
            gateway="nginx",
        )
        with up(asked, typer.echo, {**os.environ, "BEELINE_STATE": folder}) as running:
            targets = (("server", running.state.backend), ("gateway", running.state.inference))
            found = [
                _turn(target, url, running, picture, requests, clients)
                for number in range(rounds + 1)
                for target, url in (targets if number % 2 else targets[::-1])
            ]
            # What comes first finds Java cold.
            del found[: len(targets)]
    values = summary(found, picture, clients)
    typer.echo(text(values))
    if out is not None:
        out.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def summary(found: list[Round], picture: Path, clients: int) -> dict[str, object]:
    """Return medians, the ratio of each pair of turns, and what the machine is."""
    server, gateway = ([one for one in found if one.target == target] for target in ("server", "gateway"))
    ratios = sorted(behind.per_second / alone.per_second for alone, behind in zip(server, gateway, strict=True))
    cpu = statistics.median(one.gateway_cpu_ms for one in gateway)
    return {
        "server_per_second": statistics.median(one.per_second for one in server),
        "gateway_per_second": statistics.median(one.per_second for one in gateway),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "failed": sum(one.failed for one in found),
        "gateway_cpu_ms_a_request": cpu,
        "share_of_all_cores_at_goal": cpu / 1000 * _GOAL / cores(),
        "goal_per_second": _GOAL,
        "picture_bytes": picture.stat().st_size,
        "clients": clients,
        "machine": machine.summary(),
        "rounds": [asdict(one) for one in found],
    }


def text(values: dict[str, object]) -> str:
    """Return the figures for people."""
    return (
        f"no-op model, {values['picture_bytes']} bytes a request, {values['clients']} clients\n"
        f"  server alone      {values['server_per_second']:8.0f} requests/s\n"
        f"  behind the gateway{values['gateway_per_second']:8.0f} requests/s ({values['ratio']:.3f} of it)\n"
        f"  gateway's CPU time{values['gateway_cpu_ms_a_request']:8.3f} ms a request: "
        f"{100 * float(str(values['share_of_all_cores_at_goal'])):.1f} % of all cores at {_GOAL} requests/s\n"
        f"  failed            {values['failed']:8d}"
    )


def _turn(target: str, url: str, running: Running, picture: Path, requests: int, clients: int) -> Round:
    before = _cpu(running)
    turn = ab(f"{url}/predictions/noop", picture, requests, clients)
    return Round(target, turn.per_second, turn.failed, 1000 * (_cpu(running) - before) / requests)


def _cpu(running: Running) -> float:
    """Return the CPU seconds that nginx and the prober have used so far."""
    state = running.instance.read()
    assert state is not None
    found = processes.marked("no such variable", "-", Path(state.temporary) / "gateway")
    ids = {each.pid for each in found} | {state.gateway_process}
    times = (psutil.Process(pid).cpu_times() for pid in ids if pid is not None)
    return sum(each.user + each.system for each in times)


def _archive(path: Path) -> Path:
    manifest = {
        "createdOn": "01/01/2000 00:00:00",
        "runtime": "python",
        "model": {"modelName": "noop", "serializedFile": "none.pt", "handler": "noop.py", "modelVersion": "1.0"},
        "archiverVersion": "0.12.0",
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        archive.writestr("noop.py", _HANDLER)
        archive.writestr("none.pt", b"")
    return path


if __name__ == "__main__":
    typer.run(main)
