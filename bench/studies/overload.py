"""Overload: many more clients than the server holds, and whether anybody is harmed by it.

First as many clients as the gateway admits, then four times as many, then the first again. Each client asks again at
once after an answer, and after a 429 when Retry-After says so (`--rude`: at once too). Needs nginx.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated, Any

import typer

from bench import pictures
from bench.load import Plan, run
from bench.studies import Mar, Out, Picture, job, keep, served
from host.files import sha256
from serve.config import Overrides

_FIGURES = ("statuses", "errors", "good_per_second", "p50_ms", "p95_ms", "p99_ms", "without_retry_after")


def main(
    mar: Mar,
    picture: Picture,
    out: Out,
    holds: Annotated[int, typer.Option(help="Requests that the server holds.")] = 50,
    seconds: Annotated[float, typer.Option(help="Length of each phase.")] = 60.0,
    rude: Annotated[bool, typer.Option("--rude", help="Ask again at once after a 429.")] = False,
) -> None:
    """Measure and print each phase."""
    sent = pictures.read(picture)
    about = {"archive": sha256(mar), "pictures": sent.to_dict(), "holds": holds, "seconds": seconds, "rude": rude}
    numbers = f"job_queue_size={holds}\nbeeline_requests_per_second=100000\n"
    with job(out, about) as journal, served(mar, Overrides(8, 2, 2), "nginx", numbers) as (running, path):

        def phase(clients: int) -> dict[str, Any]:
            url = running.state.inference + path
            plan = Plan(url, sent, seconds, warm_up=0, clients=clients, heed_retry_after=not rude)
            figures = run(plan).summary()
            return {"clients": clients, **{key: figures[key] for key in _FIGURES}}

        phases = []
        for name, clients in (("as many as it holds", holds), ("overload", 4 * holds), ("afterwards", holds)):
            phases.append({"phase": name, **journal.once(name, partial(phase, clients))})
            typer.echo(json.dumps(phases[-1]))
        ratio, afterwards = (round(each["p95_ms"] / phases[0]["p95_ms"], 3) for each in phases[1:])
        typer.echo(f"p95 of the good answers under overload: {ratio} times that before; afterwards {afterwards} times")
        keep(out, about, {"phases": phases, "p95_ratio": ratio, "p95_ratio_afterwards": afterwards})


if __name__ == "__main__":
    typer.run(main)
