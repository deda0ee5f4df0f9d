"""How `beeline bench tune` ends: table, sentence, plot, the change of the file, and whether it is made."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from bench.record import append
from bench.report import page
from bench.tune.tune import Tuned
from cli.console import fail, result, say


def tell(tuned: Tuned, out: Path | None, write: bool, as_json: bool) -> None:
    """Print what was found, keep it, change the configuration file where that is wanted.

    Args:
        tuned: what was found.
        out: a file of records to add this one to.
        write: change the file without asking.
        as_json: end with one JSON object.

    Raises:
        typer.Exit: 1 where nothing holds the goal, 128 and the signal's number where one interrupted it.
    """
    plot = tuned.journal.with_suffix(".html")
    plot.write_text(page([tuned.record]).html(), encoding="utf-8")
    if out is not None:
        append(out, tuned.record)
    for line in tuned.answer.lines():
        say(line)
    diff = "" if tuned.change is None else tuned.change.diff
    if diff:
        say(diff)
    written = bool(diff) and _agreed(tuned, write)
    if written:
        assert tuned.change is not None
        tuned.change.write()
    ending = [tuned.answer.sentence, f"plot: {plot}", _about_file(tuned, diff, written)]
    if tuned.asked is not None:
        ending.append(f"interrupted; the same command with --resume {tuned.journal} goes on from there")
    values = {
        **tuned.record.result,
        "diff": diff,
        "written": written,
        "plot": str(plot),
        "journal": str(tuned.journal),
    }
    result(values, as_json, "\n".join(line for line in ending if line))
    if tuned.asked is not None:
        raise typer.Exit(tuned.asked.exit_code) from tuned.asked
    if not tuned.answer.holds:
        fail()


def _agreed(tuned: Tuned, write: bool) -> bool:
    """Say whether the file is to be changed; who interrupted the measuring is not asked."""
    if tuned.asked is not None:
        return False
    if write or not sys.stdin.isatty():
        return write
    assert tuned.change is not None
    return typer.confirm(f"write this to {tuned.change.path}?", err=True)


def _about_file(tuned: Tuned, diff: str, written: bool) -> str:
    if tuned.change is None:
        return "the configuration file stays as it is: nothing measured holds the goal"
    path = tuned.change.path
    if not diff:
        return f"{path} says so already"
    if written:
        return f"{path} is changed"
    how = f"--resume {tuned.journal} --minutes 0 --write" if tuned.asked is not None else "--write"
    return f"{path} is as it was; {how} makes the change shown above"
