"""The sections of tuning and of exhaustive sweeps: throughput against p95, the budget, what was chosen and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.ladder.text import number
from bench.report.axis import Axis
from bench.report.block import Block, Chart, Figures, Key, Section, Sentences, Table
from bench.report.plot import Plot
from bench.report.run import Run, counted

_SETTINGS = ("batch_size", "workers", "max_batch_delay", "threads")
_HEADS = ("batch size", "workers", "delay ms", "threads", "requests/s", "p95 ms", "failed", "goal", "")
# A longer table is closed until somebody opens it.
_LONG = 20
_REASONS = 12


def section(runs: Sequence[Run], model: str) -> Section:
    """Return the section of one model's tunings, overlaid."""
    blocks: list[Block] = []
    for run in runs:
        result = run.result
        name = "" if len(runs) == 1 else f"{run.name}: "
        tone = "lead" if result.get("holds", bool(result["best"] and result["best"]["holds"])) else "bad"
        blocks.append(Sentences((f"{name}{result['sentence']}",), tone))
        if result["interrupted"]:
            blocks.append(Sentences((f"{name}it was interrupted; this is what was known until then.",), "bad"))
    if len(runs) == 1 and runs[0].result["best"]:
        blocks.append(_figures(runs[0].result))
    blocks.append(_chart(runs, "best", "chosen"))
    for run in runs:
        blocks += [_tried(run, "best", "chosen"), *_fit(run), *_pruned(run)]
    return Section(f"Tuning of {model}", tuple(blocks))


def sweep(run: Run) -> Section:
    """Return the section of one sweep: all configurations, the best, and the tuner's choice among them."""
    result = run.result
    blocks: list[Block] = []
    tuned, best = result.get("tuned"), result["best"]
    if tuned and best:
        blocks.append(
            Sentences(
                (
                    f"The tuner's choice, {_settings(tuned)}, reaches {result['share']:.1%} of the best of "
                    f"{len(result['tried'])} configurations, {_settings(best)}.",
                ),
                "lead" if result["share"] >= 0.95 else "bad",
            )
        )
    blocks += [
        _chart([run], "tuned", "the tuner's choice"),
        *_beside(result),
        _tried(run, "tuned", "the tuner's choice"),
    ]
    return Section(f"Sweep of {run.name}: every configuration", tuple(blocks))


def _beside(result: Mapping[str, Any]) -> list[Block]:
    """Return the rivals measured side by side: the best of many single turns is partly the luckiest one."""
    rows = tuple(
        (_settings(row), number(row["per_second"]), _ms(row["p95_ms"], ""), str(row["failed"]))
        for row in result.get("beside", ())
    )
    heads = ("configuration", "requests/s", "p95 ms", "failed")
    return [Table("The best of the sweep and the tuner's choice, measured again in turns", heads, rows)] if rows else []


def _figures(result: Mapping[str, Any]) -> Figures:
    best = result["best"]
    return Figures(
        (
            (number(best["per_second"]), "requests a second"),
            (_ms(best["p95_ms"]), f"p95; the goal is {_goal(result['goal'])}"),
            (str(best["batch_size"]), "batch size"),
            (str(best["workers"]), "workers"),
            (f"{best['max_batch_delay']} ms", "longest wait for a batch to fill"),
            (str(best["threads"]), "threads a worker"),
        )
    )


def _chart(runs: Sequence[Run], key: str, word: str) -> Chart:
    tried = [(run, row) for run in runs for row in run.result["tried"] if row["p95_ms"] is not None]
    goals = [run.result["goal"] for run in runs]
    waits = [row["p95_ms"] for _, row in tried] + [goal["p95_ms"] for goal in goals if "p95_ms" in goal]
    rates = [row["per_second"] for _, row in tried] + [goal["rate"] for goal in goals if "rate" in goal]
    plot = Plot(
        "Throughput against p95",
        " ".join(_told(run, key, word) for run in runs),
        Axis.decades("p95 latency, ms", waits),
        Axis.linear("requests a second", rates),
    )
    for goal in {tuple(goal.items()): goal for goal in goals}.values():
        if "p95_ms" in goal:
            plot.vertical(goal["p95_ms"], f"budget: p95 {goal['p95_ms']:g} ms")
        else:
            plot.horizontal(goal["rate"], f"to hold: {goal['rate']:g}/s")
    for run, row in tried:
        tip = f"{_settings(row)}: {number(row['per_second'])}/s, p95 {_ms(row['p95_ms'])}"
        style = "" if row["holds"] else "hollow"
        plot.marker((row["p95_ms"], row["per_second"]), run.number, tip, style)
    for run in runs:
        for row, mark in _marks(run, key, word):
            if row["p95_ms"] is not None:
                plot.ring((row["p95_ms"], row["per_second"]), f"{mark} ({run.name})" if len(runs) > 1 else mark)
    keys = tuple(Key(run.number, run.name) for run in runs) if len(runs) > 1 else ()
    caption = "Requests a second against the 95th percentile (logarithmic). Filled: holds the goal; hollow: does not."
    return Chart(plot.svg(), caption, plot.told, keys)


def _told(run: Run, key: str, word: str) -> str:
    rows = run.result["tried"]
    chosen = _find(run, key)
    said = (
        f"{run.name}: {len(rows)} configurations, {sum(row['holds'] for row in rows)} hold {_goal(run.result['goal'])}."
    )
    if chosen is not None:
        said += f" {word}: {_settings(chosen)}, {number(chosen['per_second'])}/s, p95 {_ms(chosen['p95_ms'])}."
    return said


def _marks(run: Run, key: str, word: str) -> list[tuple[Mapping[str, Any], str]]:
    """Return the rows that stand out, each with its word; one that is both has both."""
    chosen, best = _find(run, key), _find(run, "best")
    if chosen is None or key == "best" or best is None:
        return [] if chosen is None else [(chosen, word)]
    return [(chosen, f"{word}, and the best")] if chosen is best else [(best, "the best"), (chosen, word)]


def _find(run: Run, key: str) -> Mapping[str, Any] | None:
    """Return the measured row of the configuration under `key`, or itself where it was not among them."""
    wanted = run.result.get(key)
    if not wanted:
        return None
    same = (row for row in run.result["tried"] if all(row[name] == wanted[name] for name in _SETTINGS))
    found: Mapping[str, Any] | None = next(same, wanted if "per_second" in wanted else None)
    return found


def _tried(run: Run, key: str, word: str) -> Table:
    marks = _marks(run, key, word)
    rows = sorted(run.result["tried"], key=lambda row: (not row["holds"], -row["per_second"]))
    cells = tuple(
        (
            *(str(row[name]) for name in _SETTINGS),
            number(row["per_second"]),
            _ms(row["p95_ms"], ""),
            str(row["failed"]),
            "holds" if row["holds"] else "no",
            next((mark for one, mark in marks if one is row), ""),
        )
        for row in rows
    )
    marked = frozenset(i for i, row in enumerate(rows) if any(one is row for one, _ in marks))
    caption = f"What was measured: {run.name}, {len(rows)} configurations; what holds the goal first"
    return Table(caption, _HEADS, cells, marked, len(rows) > _LONG)


def _fit(run: Run) -> list[Block]:
    fits = run.result.get("fits") or [run.result["fit"]]
    rows = tuple(
        (str(fit.get("threads", "-")), number(fit["a_ms"]), number(fit["b_ms"]), f"{fit['error']:.1%}")
        for fit in fits
        if fit
    )
    heads = ("threads", "ms an image", "ms a batch", "largest error")
    return [Table(f"A batch's time as a line, from the ladder: {run.name}", heads, rows)] if rows else []


def _pruned(run: Run) -> list[Block]:
    rows = tuple((str(one["what"]), str(one["why"])) for one in run.result["pruned"])
    if not rows:
        return []
    return [
        Table(
            f"What was not measured, and why: {run.name}",
            ("what", "why"),
            rows,
            folded=len(rows) > _REASONS,
            words=True,
        )
    ]


def _settings(row: Mapping[str, Any]) -> str:
    return (
        f"batch size {row['batch_size']}, {counted(row['workers'], 'worker')}, delay {row['max_batch_delay']} ms, "
        f"{counted(row['threads'], 'thread')}"
    )


def _goal(goal: Mapping[str, float]) -> str:
    return f"p95 of {goal['p95_ms']:g} ms" if "p95_ms" in goal else f"{goal['rate']:g} arrivals/s"


def _ms(value: float | None, unit: str = " ms") -> str:
    return "-" if value is None else f"{number(value)}{unit}"
