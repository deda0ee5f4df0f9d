"""A `table` record's result for the terminal: a table with the knee marked, then what it says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from bench.ladder.row import STAGES, Row

if TYPE_CHECKING:
    from rich.table import Table

# What each stage is called above its columns.
TITLES = {"forward": "forward alone", "copied": "+ copy", "decoded": "+ decode", "handler": "whole handler"}
_CUDA_COPY = "+ copy to device"
_HEADS = ("batch", "threads", "precision")


def progress(row: Row) -> str:
    """Return one line for a row that was just measured."""
    if row.error is not None:
        return f"batch {row.batch}: {row.error}"
    parts = ", ".join(f"{TITLES[stage]} {row.per_image(stage):.3g}" for stage in STAGES)
    return f"batch {row.batch}: ms per image: {parts}"


def plain(result: Mapping[str, Any]) -> str:
    """Return the ladder as lines of text."""
    heads = [*_HEADS, *titles(result).values(), ""]
    cells = [heads, *([*one[:-1], "<- knee" if one[-1] else ""] for one in _cells(result))]
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in range(len(heads))]
    lines = ["  ".join(text.rjust(widths[i]) for i, text in enumerate(row)).rstrip() for row in cells]
    return "\n".join((_title(result), "each: ms a batch (quartiles), ms per image", *lines, "", *sentences(result)))


def rich(result: Mapping[str, Any]) -> Table:
    """Return the ladder as a table for a terminal; `sentences` belong below it."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(_title(result)), caption="each: ms a batch (quartiles), ms per image", title_style="bold"
    )
    for head in (*_HEADS, *titles(result).values()):
        table.add_column(head, justify="right")
    for *cells, is_knee in _cells(result):
        table.add_row(*map(escape, cells), style="bold green" if is_knee else None)
    return table


def notes(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the ladder says, each with what it is about: knee, end, references, differences, what was not run."""
    lines = []
    if result["knee"] is not None:
        lines.append(("knee", f"batch {result['knee']}, the smallest within 5 % of the cheapest image"))
    lines.append(("ended by", str(result["ended"])))
    for reference in result["reference"]:
        points = ", ".join(f"{each:g} at batch {batch}" for batch, each in reference["points"])
        worse = f", worse at {reference['worse_at']}" if reference.get("worse_at") else ""
        lines.append((reference["what"], f"{points}{worse} ({reference['unit']})"))
    lines += [("shape", sentence) for sentence in result["differences"]]
    return lines + [(one["what"], f"not run, {one['why']}") for one in result["not_run"]]


def sentences(result: Mapping[str, Any]) -> list[str]:
    """Return the notes as lines."""
    return [f"{about}: {said}" for about, said in notes(result)]


def titles(result: Mapping[str, Any]) -> dict[str, str]:
    """Return each stage's column head; only a CUDA device is copied to."""
    copy = _CUDA_COPY if str(result["device"]).startswith("cuda") else TITLES["copied"]
    return {**TITLES, "copied": copy}


def _title(result: Mapping[str, Any]) -> str:
    return f"{result['model']} {result['version']}, {result['classes']} classes, on {result['device']}"


def _cells(result: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Yield each row's cells, and whether it is the knee."""
    for row in result["rows"]:
        first = [str(row["batch"]), str(result["threads"]), str(result["precision"])]
        if row["error"] is not None:
            yield [*first, row["error"], *[""] * (len(STAGES) - 1), False]
        else:
            yield [*first, *(_cell(row[stage]) for stage in STAGES), row["batch"] == result["knee"]]


def _cell(timing: Mapping[str, float]) -> str:
    spread = f"{number(timing['low_ms'])}-{number(timing['high_ms'])}"
    return f"{number(timing['median_ms'])} ({spread})  {number(timing['ms_per_image'])}"


def number(value: float) -> str:
    """Return three figures, without an exponent: `0.0123`, `1.23`, `12.3`, `123`, `1234`."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:#.3g}" if value >= 0.001 else f"{value:.4f}"
