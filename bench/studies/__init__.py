"""Measurements that only we run: `python -m bench.studies.NAME --help`. Each is a job that goes on where it stopped."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.record import Journal, machine, utc
from host.files import write_json
from host.signals import Interrupted, as_exceptions
from serve.addresses import Ports
from serve.config import Overrides
from serve.instance.child import Running
from serve.up import Request, up

Out = Annotated[Path, typer.Option(help="Write the figures here as JSON.")]
Rounds = Annotated[int, typer.Option(help="Turns of each.")]
Clients = Annotated[int, typer.Option(help="Keep-alive clients.")]
Picture = Annotated[Path, typer.Option(help="What is sent.")]
Mar = Annotated[Path, typer.Option(help="The archive to serve.")]


@contextmanager
def job(path: Path, about: Mapping[str, Any]) -> Iterator[Journal]:
    """Yield the journal of what is measured into `path`; interrupted, the same command goes on with what it has."""
    journal = Journal.job(path.with_suffix(".journal"), about)
    try:
        with as_exceptions():
            yield journal
    except Interrupted as interruption:
        typer.echo(f"interrupted ({interruption}); the same command goes on from there", err=True)
        raise typer.Exit(interruption.exit_code) from interruption
    journal.path.unlink()


def keep(path: Path, about: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Write what a study measured, when, where, and of what."""
    write_json(path, {"at": utc(), "machine": machine(), **about, **result})


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
