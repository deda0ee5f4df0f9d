"""Measurements for developers: `python -m bench.studies.NAME --help`. Interrupted, the long ones go on from there."""

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
    """Yield the journal next to `path`, which is removed at the end; after an interruption the same job goes on."""
    journal = Journal.job(path.with_suffix(".journal"), about)
    try:
        with as_exceptions():
            yield journal
    except Interrupted as interruption:
        typer.echo(f"interrupted ({interruption}); the same command goes on from there", err=True)
        raise typer.Exit(interruption.exit_code) from interruption
    journal.path.unlink()


def keep(path: Path, about: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Write the figures of a study, with the time, the machine and what was measured."""
    write_json(path, {"at": utc(), "machine": machine(), **about, **result})
