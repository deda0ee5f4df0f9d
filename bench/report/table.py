"""The section of ladders: milliseconds an image against batch, the references over it, and every figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.ladder.row import STAGES
from bench.ladder.text import notes, number, titles
from bench.report.axis import Axis
from bench.report.block import Block, Chart, Figures, Key, Section, Table
from bench.report.plot import Plot
from bench.report.run import Run


def section(runs: Sequence[Run]) -> Section:
    """Return the section of all ladders, overlaid."""
    blocks: list[Block] = []
    if len(runs) == 1:
        blocks.append(_figures(runs[0].result))
    blocks += [_chart(runs), *(table for run in runs for table in _tables(run))]
    blocks += [
        Table(f"What it says: {run.name}", ("about", "finding"), tuple(notes(run.result)), words=True) for run in runs
    ]
    return Section("Ladder: what an image costs at each batch size", tuple(blocks))


def _figures(result: Mapping[str, Any]) -> Figures:
    items = [(str(result["knee"] or "none"), "knee: batch size")]
    row = next((row for row in result["rows"] if row["batch"] == result["knee"]), None)
    if row is not None:
        handler = row["handler"]["ms_per_image"]
        items += [
            (f"{number(handler)} ms", "an image there, the whole handler"),
            (f"{number(row['forward']['ms_per_image'])} ms", "an image there, the forward pass alone"),
            (f"{number(1000 / handler)}", "images a second of one worker"),
        ]
    return Figures(tuple(items))


def _chart(runs: Sequence[Run]) -> Chart:
    lines = [
        (name, series, dashed, _points(run.result, stage))
        for run in runs
        for name, series, dashed, stage in _lines(run, len(runs))
    ]
    references = [one for one in runs[0].result["reference"] if one["points"]]
    failed = [(run, row) for run in runs for row in run.result["rows"] if row["error"] is not None]
    points = [point for *_, some in lines for point in some]
    points += [(batch, each) for one in references for batch, each in one["points"]]
    batches = [batch for batch, _ in points] + [row["batch"] for _, row in failed]
    batches += [one["worse_at"] for one in references if one.get("worse_at")]
    plot = Plot(
        "Milliseconds per image by batch size",
        _told(runs, references),
        Axis.powers("pictures in a batch", batches),
        Axis.decades("ms per image", [each for _, each in points]),
    )
    for row, run in enumerate(runs):
        if run.result["knee"] is not None:
            name = f"knee: {run.result['knee']}" + (f" ({run.name})" if len(runs) > 1 else "")
            plot.vertical(run.result["knee"], name, "knee", row)
    for one in references:
        _draw_reference(plot, one)
    for name, series, dashed, some in lines:
        plot.line(some, series, "dashed" if dashed else "")
        for batch, each in some:
            plot.marker((batch, each), series, f"{name}: {number(each)} ms per image at batch {batch:g}")
    for run, row in failed:
        plot.cross(row["batch"], row["error"] if len(runs) == 1 else f"{row['error']} ({run.name})")
    keys = [Key(series, name) for name, series, dashed, _ in lines if not dashed]
    keys += [Key(None, one["what"]) for one in references]
    several = " Solid: the whole handler; dashed: the forward pass alone." if len(runs) > 1 else ""
    worse = " Dotted: reported as worse, without a figure." if any(one.get("worse_at") for one in references) else ""
    caption = (
        "Milliseconds per image, medians; each stage includes those before it. Both axes are logarithmic: equal "
        f"distances are equal ratios.{several}{worse}"
    )
    return Chart(plot.svg(), caption, plot.told, tuple(keys))


def _lines(run: Run, count: int) -> list[tuple[str, int, bool, str]]:
    """Return what is drawn of a run: name, series, whether dashed, stage."""
    if count == 1:
        return [(titles(run.result)[stage], i, False, stage) for i, stage in enumerate(STAGES)]
    both = [("forward", True), ("handler", False)]
    return [(run.name, run.number, dashed, stage) for stage, dashed in both]


def _points(result: Mapping[str, Any], stage: str) -> list[tuple[float, float]]:
    return [(row["batch"], row[stage]["ms_per_image"]) for row in result["rows"] if row["error"] is None]


def _draw_reference(plot: Plot, one: Mapping[str, Any]) -> None:
    points = [(batch, each) for batch, each in one["points"]]
    plot.line(points, None)
    for batch, each in points:
        plot.marker((batch, each), None, f"{one['what']}: {each:g} {one['unit']} at batch {batch:g}")
    if one.get("worse_at"):
        batch, each = points[-1]
        plot.line([(batch, each), (one["worse_at"], each * 1.12)], None, "dotted")


def _told(runs: Sequence[Run], references: Sequence[Mapping[str, Any]]) -> str:
    """Return in words what the chart shows."""
    said = []
    for run in runs:
        points = _points(run.result, "handler")
        if points:
            (small, before), (large, after) = points[0], points[-1]
            said.append(
                f"{run.name}: the whole handler takes {number(before)} ms per image at batch {small:g} "
                f"and {number(after)} at batch {large:g}; the knee is at {run.result['knee']}."
            )
        said += [f"Batch {row['batch']}: {row['error']}." for row in run.result["rows"] if row["error"] is not None]
    for one in references:
        points_of = ", ".join(f"{each:g} at batch {batch:g}" for batch, each in one["points"])
        said.append(f"{one['what']}: {points_of}.")
    return " ".join(said)


def _tables(run: Run) -> list[Block]:
    """Return every figure: a batch's milliseconds with quartiles, and an image's."""
    return [
        _table(run, f"Milliseconds a batch, median (quartiles): {run.name}", _spread),
        _table(run, f"Milliseconds per image: {run.name}", lambda timing: number(timing["ms_per_image"])),
    ]


def _table(run: Run, caption: str, cell: Callable[[Mapping[str, float]], str]) -> Table:
    result = run.result
    heads = ("batch", "threads", "precision", *titles(result).values())
    rows = []
    for row in result["rows"]:
        knee = " (knee)" if row["batch"] == result["knee"] else ""
        first = (f"{row['batch']}{knee}", str(result["threads"]), str(result["precision"]))
        if row["error"] is not None:
            rows.append((*first, row["error"], *["-"] * (len(STAGES) - 1)))
        else:
            rows.append((*first, *(cell(row[stage]) for stage in STAGES)))
    marked = frozenset(i for i, row in enumerate(result["rows"]) if row["batch"] == result["knee"])
    return Table(caption, heads, tuple(rows), marked)


def _spread(timing: Mapping[str, float]) -> str:
    return f"{number(timing['median_ms'])} ({number(timing['low_ms'])} to {number(timing['high_ms'])})"
