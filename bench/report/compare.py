"""The section of comparisons: bars with intervals in groups that are never mixed, and every column."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.ladder.text import number
from bench.report.bars import Bar, lying
from bench.report.block import Block, Chart, Section, Sentences, Table
from bench.report.run import Run

_HEADS = (
    "server", "requests/s", "p95 ms", "ratio (interval)", "verdict", "threads", "precision", "batch", "workers",
    "failed", "top-1 agreement", "memory MB", "ready s",
)  # fmt: skip


def section(runs: Sequence[Run]) -> Section:
    """Return the section of all comparisons, a chart and a table a class of rows."""
    blocks: list[Block] = [_same_twice(runs)]
    for name in dict.fromkeys(row["class"] for run in runs for row in run.result["rows"]):
        blocks.append(_chart(runs, name))
        blocks += [_table(run, name, len(runs) == 1) for run in runs]
    blocks += [_patterns(runs), *(_rounds(run) for run in runs)]
    failed = [
        f"{row['server']} ({run.name}): {row['error']}" for run in runs for row in run.result["rows"] if row["error"]
    ]
    if failed:
        blocks.append(Sentences(("Could not be measured, or not to the end:", *failed), "bad"))
    return Section("Comparison: the same model, pictures and machine, servers in turn", tuple(blocks))


def _same_twice(runs: Sequence[Run]) -> Sentences:
    """Return what the same server entered twice came to: what noise alone looks like here."""
    said = []
    good = True
    for run in runs:
        again = run.result.get("aa")
        name = "" if len(runs) == 1 else f"{run.name}: "
        if not again or not again.get("ratio"):
            said.append(f"{name}no server was measured twice, so nobody knows what noise looks like here.")
            good = False
            continue
        said.append(
            f"{name}A/A, the same server entered twice ({again['server']}): {again['verdict']}, {_ratio(again)} of "
            "itself. What differs by no more than that is noise."
        )
        good = good and again["verdict"] == "no difference"
    return Sentences(tuple(said), "good" if good else "bad")


def _chart(runs: Sequence[Run], name: str) -> Chart:
    found = [(run, row) for run in runs for row in run.result["rows"] if row["class"] == name]
    # The fastest first, whoever that is; the runs of one server stay together.
    best: dict[str, float] = {}
    for _, row in found:
        best[row["server"]] = max(best.get(row["server"], -1.0), _median(row["per_second"]) or 0.0)
    found.sort(key=lambda each: (-best[each[1]["server"]], each[1]["server"], each[0].number))
    bars = [_bar(run, row, len(runs) > 1) for run, row in found]
    told = "; ".join(f"{bar.name} {bar.text}" for bar in bars)
    against = _first(runs[0], name)
    caption = (
        f"{_title(name)}: requests a second, the median of the rounds, fastest first; each dot is a round. "
        + (f"Whisker: the interval of the ratio to {against['server']}, on the same scale. " if against else "")
        + "Compare within this chart alone."
    )
    return Chart(lying(f"Requests a second, servers {name}", told, bars), caption, told)


def _bar(run: Run, row: Mapping[str, Any], several: bool) -> Bar:
    name = f"{row['server']} ({run.name})" if several else str(row["server"])
    median = _median(row["per_second"])
    if median is None:
        return Bar(name, None, "not measured", run.number)
    first = _first(run, row["class"])
    base = _median(first["per_second"]) if first else None
    interval = None
    if base and row["interval"] and row is not first:
        interval = (row["interval"][0] * base, row["interval"][1] * base)
    words = f"{number(median)}/s"
    if row is not first and row["ratio"]:
        words += f", {row['ratio']:.2f} times, {row['verdict']}"
    return Bar(name, median, words, run.number, interval, tuple(row["per_second"]))


def _first(run: Run, name: str) -> Mapping[str, Any] | None:
    """Return the row that the others of its class are compared with."""
    rows = [row for row in run.result["rows"] if row["class"] == name and row["per_second"]]
    named = next((row["compared_with"] for row in rows if row.get("compared_with")), None)
    return next((row for row in rows if row["server"] == named), rows[0] if rows else None)


def _table(run: Run, name: str, alone: bool) -> Table:
    rows = [row for row in run.result["rows"] if row["class"] == name]
    cells = tuple(_cells(row) for row in rows)
    caption = f"{_title(name)}, every column" + ("" if alone else f": {run.name}")
    return Table(caption, _HEADS, cells, frozenset(i for i, row in enumerate(rows) if row["verdict"] == "faster"))


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    if not row["per_second"]:
        # Without an error it was not its turn yet when somebody ended the comparison.
        return (
            str(row["server"]),
            "could not be measured" if row["error"] else "not measured",
            *["-"] * (len(_HEADS) - 2),
        )
    return (
        str(row["server"]),
        number(statistics.median(row["per_second"])),
        _or_dash(_median([value for value in row["p95_ms"] if value is not None])),
        _ratio(row) if row["ratio"] else "-",
        str(row["verdict"] or "-"),
        "default" if row["threads"] is None else str(row["threads"]),
        str(row["precision"]),
        str(row["batch"]),
        str(row["workers"]),
        str(row["failed"]),
        "-" if row["agreement"] is None else f"{row['agreement']:.1%}",
        "-" if row["memory_mb"] is None else f"{row['memory_mb']:.0f}",
        "-" if row["ready_s"] is None else f"{row['ready_s']:.1f}",
    )


def _patterns(runs: Sequence[Run]) -> Table:
    """Return what each server is, in a line."""
    found = {row["server"]: (row["class"], row["pattern"]) for run in runs for row in run.result["rows"]}
    rows = tuple((str(name), *map(str, about)) for name, about in found.items())
    return Table("What each server is", ("server", "class", "pattern"), rows, words=True)


def _rounds(run: Run) -> Table:
    """Return the figures that the medians are of."""
    rows = tuple(
        (
            str(row["server"]),
            ", ".join(number(value) for value in row["per_second"]) or "-",
            ", ".join(_or_dash(value) for value in row["p95_ms"]) or "-",
        )
        for row in [*run.result["rows"], *([run.result["aa"]] if run.result.get("aa") else [])]
    )
    heads = ("server", "requests/s", "p95 ms")
    return Table(
        f"Each round: {run.name}; last the server that was entered twice", heads, rows, folded=True, words=True
    )


def _or_dash(value: float | None) -> str:
    return "-" if value is None else number(value)


def _ratio(row: Mapping[str, Any]) -> str:
    low, high = row["interval"]
    return f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _title(name: str) -> str:
    return name[:1].upper() + name[1:]
