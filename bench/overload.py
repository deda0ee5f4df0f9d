"""Overload: many more clients than the server holds, and whether anybody is harmed by it.

First as many clients as the gateway admits, then four times as many, then the first again. Each client asks
again at once after an answer, and after a 429 when Retry-After says so (`--rude`: at once too). Run it as
`python -m bench.overload --mar model_store/resnet18.mar --picture some.jpg`; needs nginx.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer

from serve.addresses import Ports
from serve.config import Overrides
from serve.up import Request, up


@dataclass
class Phase:
    """One phase: its clients, and for each answer its status and milliseconds."""

    name: str
    clients: int
    answers: list[tuple[int, float]] = field(default_factory=list)
    untold: int = 0

    def to_dict(self, seconds: float) -> dict[str, Any]:
        """Return counts by status, good answers a second, percentiles of the good ones in milliseconds."""
        good = sorted(took for status, took in self.answers if status == 200)
        cuts = statistics.quantiles(good, n=100) if len(good) > 1 else [0.0] * 99
        return {
            "phase": self.name,
            "clients": self.clients,
            "statuses": dict(Counter(str(status) for status, _ in self.answers)),
            "429 without Retry-After": self.untold,
            "good_per_second": round(len(good) / seconds, 1),
            "p50_ms": round(cuts[49], 1),
            "p95_ms": round(cuts[94], 1),
            "p99_ms": round(cuts[98], 1),
        }


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
            phases = [Phase("as many as it holds", holds), Phase("overload", 4 * holds), Phase("afterwards", holds)]
            for phase in phases:
                asyncio.run(_load(phase, url, picture.read_bytes(), seconds, rude))
                typer.echo(json.dumps(phase.to_dict(seconds)))
    found = [phase.to_dict(seconds) for phase in phases]
    values = {
        "phases": found,
        "p95_ratio": round(found[1]["p95_ms"] / found[0]["p95_ms"], 3),
        "p95_ratio_afterwards": round(found[2]["p95_ms"] / found[0]["p95_ms"], 3),
        "rude": rude,
        "holds": holds,
        "seconds": seconds,
        "archive": mar.name,
        "picture_bytes": picture.stat().st_size,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
    }
    typer.echo(
        f"p95 of the good answers under overload: {values['p95_ratio']} times that before; "
        f"afterwards {values['p95_ratio_afterwards']} times"
    )
    if out is not None:
        out.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


async def _load(phase: Phase, url: str, data: bytes, seconds: float, rude: bool) -> None:
    end = time.monotonic() + seconds
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(_client(phase, session, url, data, end, rude) for _ in range(phase.clients)))


async def _client(phase: Phase, session: aiohttp.ClientSession, url: str, data: bytes, end: float, rude: bool) -> None:
    for _ in itertools.takewhile(lambda _: time.monotonic() < end, itertools.count()):
        began = time.perf_counter()
        async with session.post(url, data=data, headers={"Content-Type": "image/jpeg"}) as answer:
            await answer.read()
            phase.answers.append((answer.status, 1000 * (time.perf_counter() - began)))
            told = answer.headers.get("Retry-After")
        if answer.status == 429:
            phase.untold += told is None
            await asyncio.sleep(0 if rude else float(told or 1))


if __name__ == "__main__":
    typer.run(main)
