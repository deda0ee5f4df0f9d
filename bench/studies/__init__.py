"""Measurements that only we run: `python -m bench.studies.NAME --help`. Each is a job that goes on where it stopped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.record import Journal, machine, utc
from host.files import write_json
from host.signals import Interrupted, as_exceptions

Out = Annotated[Path, typer.Option(help="Write the figures here as JSON.")]
Rounds = Annotated[int, typer.Option(help="Turns of each.")]


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
