"""Overload: many more clients than the server holds, and whether anybody is harmed by it.

First as many clients as the gateway admits, then four times as many, then the first again. Each client asks
again at once after an answer, and after a 429 when Retry-After says so (`--rude`: at once too). Run it as
`python -m bench.overload --mar model_store/resnet18.mar --picture some.jpg`; needs nginx.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import machine, pictures
from bench.load import Plan, run
from serve.addresses import Ports
from serve.config import Overrides
from serve.up import Request, up

_FIGURES = ("statuses", "errors", "good_per_second", "p50_ms", "p95_ms", "p99_ms")


def main(
    mar: Annotated[Path, typer.Option(help="The archive to serve.")],
    picture: Annotated[Path, typer.Option(help="What is sent.")],
    holds: Annotated[int, typer.Option(help="Requests that the server holds.")] = 50,
    seconds: Annotated[float, typer.Option(help="Length of each phase.")] = 60.0,
    rude: Annotated[bool, typer.Option("--rude", help="Ask again at once after a 429.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
) -> None:
    """Measure and print a table."""
    with tempfile.TemporaryDirectory(prefix="overload-") as folder:
        numbers = Path(folder) / "config.properties"
        numbers.write_text(f"job_queue_size={holds}\nbeeline_requests_per_second=100000\n", encoding="utf-8")
        asked = Request(
            wanted=(str(mar.resolve()),),
            store=mar.resolve().parent,
            config_file=numbers,
            name="bench-overload",
            overrides=Overrides(batch_size=8, workers=2, max_batch_delay=2),
            ports=Ports(0),
            gateway="nginx",
        )
        with up(asked, typer.echo, {**os.environ, "BEELINE_STATE": folder}) as running:
            model = running.state.configuration["models"][0]["model"]
            url = f"{running.state.inference}/predictions/{model}"
            found = []
            for name, clients in (("as many as it holds", holds), ("overload", 4 * holds), ("afterwards", holds)):
                found.append(_phase(name, url, picture, clients, seconds, rude))
                typer.echo(json.dumps(found[-1]))
    values = {
        "phases": found,
        "p95_ratio": round(found[1]["p95_ms"] / found[0]["p95_ms"], 3),
        "p95_ratio_afterwards": round(found[2]["p95_ms"] / found[0]["p95_ms"], 3),
        "rude": rude,
        "holds": holds,
        "seconds": seconds,
        "archive": mar.name,
        "picture_bytes": picture.stat().st_size,
        "machine": machine.summary(),
    }
    typer.echo(
        f"p95 of the good answers under overload: {values['p95_ratio']} times that before; "
        f"afterwards {values['p95_ratio_afterwards']} times"
    )
    if out is not None:
        out.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _phase(name: str, url: str, picture: Path, clients: int, seconds: float, rude: bool) -> dict[str, Any]:
    """Return one phase's counts by status, good answers a second, percentiles of the good ones in milliseconds."""
    plan = Plan(url, pictures.read(picture), seconds, warm_up=0, clients=clients, heed_retry_after=not rude)
    figures = run(plan).summary()
    chosen = {key: figures[key] for key in _FIGURES}
    return {"phase": name, "clients": clients, "429 without Retry-After": figures["without_retry_after"], **chosen}


if __name__ == "__main__":
    typer.run(main)
