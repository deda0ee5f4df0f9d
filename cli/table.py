"""How `beeline bench table` begins and ends: a run becomes an archive, a ladder a table and a record."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cli.archive import exported_folder
from cli.console import out as stdout
from cli.console import result, say

if TYPE_CHECKING:
    from bench.ladder.ladder import Ladder
    from bench.record import Record


@contextmanager
def archive_of(source: Path) -> Iterator[Path]:
    """Yield the archive at `source`, or of that name in the store; a run is built into one that is removed after.

    So what is measured is always what would ship.

    Raises:
        BeelineError: when there is neither.
    """
    if not source.is_dir():
        from archive.store import locate

        yield locate(source)
        return
    from archive.build import build

    with tempfile.TemporaryDirectory(prefix="beeline-table-") as scratch:
        say(f"building {source} into an archive, which is removed afterwards ...")
        yield build(exported_folder(source), Path(scratch), check=False).path


def tell(ladder: Ladder, record: Record, out: Path | None, as_json: bool) -> None:
    """Print the ladder, and keep its record.

    Raises:
        typer.Exit: 128 and the signal's number where one interrupted it.
    """
    from bench.ladder import text
    from bench.record import append

    if out is not None:
        append(out, record)
    if as_json or not stdout.is_terminal:
        result(record.result, as_json, text.plain(record.result))
    else:
        stdout.print(text.rich(record.result), soft_wrap=False)
        stdout.print("\n".join(text.sentences(record.result)), markup=False, soft_wrap=False)
    if ladder.asked is not None:
        raise typer.Exit(ladder.asked.exit_code) from ladder.asked
