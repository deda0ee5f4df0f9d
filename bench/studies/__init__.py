"""Measurements for developers: `python -m bench.studies.NAME --help`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from bench.record import Journal
from host.signals import Interrupted, as_exceptions


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
