"""Records as a report: a section for each kind, runs of one kind in one chart, and last how they were measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import record as files
from bench.record import Record
from bench.sweep import STAGES
from host.report import Block, Page, Section, Sentences, Table, number, terminal
from host.report.charts import Bar, Line, bars, plot

Result = Mapping[str, Any]
_PERCENTILES = ("p50", "p95", "p99")
_SETTINGS = ("batch_size", "workers", "max_batch_delay", "threads")
_TRIED = (*_SETTINGS, "per_second", "p95_ms", "failed", "turns", "holds")
# Longer tables are closed until somebody opens them.
_LONG = 20


@dataclass(frozen=True)
class Run:
    """A record; its file's label if there are several files; its name if there are several of its kind."""

    record: Record
    label: str = ""
    name: str = ""

    @property
    def result(self) -> Result:
        """The record's figures."""
        return self.record.result


def read(paths: Sequence[Path]) -> list[Run]:
    """Return the runs of files; raise `BeelineError` for a file that is not there or holds no records."""
    labels = {path: "/".join(path.with_suffix("").parts[-2:]) if len(paths) > 1 else "" for path in paths}
    return [Run(record, label) for path, label in labels.items() for record in files.read(path)]


def page(runs: Sequence[Run]) -> Page:
    """Return the report of one or more runs of any kinds."""
    runs = [replace(run, name=f"{i}. {_join(run.label, _details(run.record))}") for i, run in enumerate(runs, 1)]
    sections = []
    for kind, (_, section, _) in _KINDS.items():
        own = [run for run in runs if run.record.kind == kind]
        own = [replace(own[0], name="")] if len(own) == 1 else own
        # Loads and sweeps share a chart. Comparisons and tunings do not: the machine's speed differs by the hour.
        groups = [own] if kind in ("load", "sweep") else [[run] for run in own]
        sections += [section(group) for group in groups if group]
    models = ", ".join(dict.fromkeys(str(run.result["model"]) for run in runs if run.result.get("model")))
    title = f"Beeline: {', '.join(dict.fromkeys(_KINDS[run.record.kind][0] for run in runs))}"
    times = sorted(run.record.started[:16].replace("T", " ") for run in runs)
    facts = f"Measured {' to '.join(dict.fromkeys((times[0], times[-1])))} (UTC)."
    return Page(f"{title} of {models}" if models else title, facts, (*sections, _origin(runs)))


def text(record: Record) -> str:
    """Return the tables of a record's section for a terminal."""
    return terminal(_KINDS[record.kind][1]([Run(record)]).blocks)


def _details(record: Record) -> str:
    result, (_, _, keys) = record.result, _KINDS[record.kind]
    return ", ".join(f"{key} {_text(result[key])}" for key in keys if result.get(key))


def _join(*parts: str) -> str:
    return ": ".join(filter(None, parts))


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')}: {_text(each)}" for key, each in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    return number(value) if value and isinstance(value, float) else str(value)


def _table(
    caption: str, rows: Sequence[Result], marked: Sequence[int] = (), words: bool = False, columns: Sequence[str] = ()
) -> list[Block]:
    """Return a table of these columns, by default the first row's keys; none without rows."""
    heads = columns or (list(rows[0]) if rows else [])
    cells = tuple(tuple(_text(row.get(key)) for key in heads) for row in rows)
    names = tuple(head.replace("_", " ") for head in heads)
    return [Table(caption, names, cells, frozenset(marked), len(rows) > _LONG, words)] if rows else []


def _facts(caption: str, items: Sequence[Result], names: Sequence[str]) -> list[Block]:
    """Return a table with a column for each item; none without keys."""
    keys = dict.fromkeys(key for item in items for key in item)
    rows = tuple((key.replace("_", " "), *(_text(item.get(key)) for item in items)) for key in keys)
    return [Table(caption, ("", *names), rows, words=True)] if rows else []


def _section(title: str, run: Run, blocks: Iterable[Block]) -> Section:
    """Return the section of one run; its tables have the run's name too, since a page's captions must differ."""
    named = [replace(one, caption=_join(one.caption, run.name)) if isinstance(one, Table) else one for one in blocks]
    return Section(_join(title, run.name), tuple(named))


def _compare(runs: Sequence[Run]) -> Section:
    """Return bars with intervals, a chart for each class, since classes are not comparable; and every column."""
    (run,) = runs
    again, rows = run.result["aa"], run.result["rows"]
    noise = "No server was measured twice, so the noise of this comparison is unknown."
    if again["ratio"]:
        noise = (
            "A/A, the same server entered twice ({server}): {verdict}, {ratio:.2f} ({interval[0]:.2f} to "
            "{interval[1]:.2f}) of itself. A difference that is no larger is noise."
        ).format_map(again)
    blocks: list[Block] = [Sentences((noise,), "good" if again["verdict"] == "no difference" else "bad")]
    for kind in dict.fromkeys(row["class"] for row in rows):
        own = sorted((row for row in rows if row["class"] == kind), key=lambda row: -(_median(row["per_second"]) or 0))
        caption = (
            f"{kind.capitalize()}: requests a second, the median of the rounds, fastest first; each dot is a round. "
            "Whisker: the interval of the ratio to the server it is compared with. Compare within this chart alone."
        )
        blocks.append(bars(f"Requests a second, servers {kind}", caption, list(map(_bar, own))))
        own += [{**again, "server": f"{again['server']}, again"}] if again["class"] == kind else []
        faster = [i for i, row in enumerate(own) if row["verdict"] == "faster"]
        medians = [{**row, **{key: _median(row[key]) for key in ("per_second", "p95_ms")}} for row in own]
        columns = [key for key in medians[0] if key not in ("class", "pattern", "error")]
        blocks += _table(f"{kind.capitalize()}, medians", medians, faster, columns=[*columns, "error"])
    columns = ["server", "class", "pattern", "per_second", "p95_ms"]
    caption = "Each server and its rounds; last the server that was entered twice"
    blocks += _table(caption, (*rows, again), words=True, columns=columns)
    return _section("Comparison: the same model, pictures and machine, servers in turn", run, blocks)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _bar(row: Result) -> Bar:
    median = _median(row["per_second"])
    if median is None:
        return Bar(row["server"], None, "could not be measured" if row["error"] else "not measured")
    words, interval = f"{number(median)}/s", tuple[float, ...]()
    if row["ratio"] and row["compared_with"] != row["server"]:
        words += f", {row['ratio']:.2f} times, {row['verdict']}"
        interval = tuple(median * end / row["ratio"] for end in row["interval"])
    return Bar(row["server"], median, words, interval, tuple(row["per_second"]))


def _load(runs: Sequence[Run]) -> Section:
    blocks: list[Block] = []
    for run in runs:
        backlog = run.result["backlog"]
        wrong = run.result["client_limited"] or run.result["failed"] or (backlog and backlog["growing"])
        blocks.append(Sentences((_join(run.name, f"{run.result['sentence']}."),), "bad" if wrong else "lead"))
    blocks += _batches(runs[0].result["batch_sizes"]) if len(runs) == 1 else [_curve(runs)]
    facts = [{key: run.result[key] for key in run.result if key != "thresholds"} for run in runs]
    blocks += _facts("Every figure", facts, [run.name or "figure" for run in runs])
    limits = [{"run": run.name, **one} for run in runs for one in run.result["thresholds"]]
    return Section("Load: a running server, from outside", (*blocks, *_table("Thresholds", limits, words=True)))


def _batches(sizes: Mapping[str, int]) -> list[Block]:
    shares = {size: count / sum(sizes.values()) for size, count in sizes.items()}
    drawn = [Bar(f"in batches of {size}", share, f"{share:.1%} of the requests") for size, share in shares.items()]
    caption = "The batch size that came with each answer (X-Batch-Size)."
    return [bars("Batch sizes", caption, drawn, 1.0)] if drawn else []


def _curve(runs: Sequence[Run]) -> Block:
    drawn: list[Line] = []
    for label in dict.fromkeys(run.label for run in runs):
        for name in _PERCENTILES:
            own = [run for run in runs if run.label == label and run.result[f"{name}_ms"] is not None]
            points = [(run.result["per_second"], run.result[f"{name}_ms"], f"{run.name}: {name}") for run in own]
            drawn.append(Line(_join(label, name), sorted(points), len(drawn)))
    caption = "Latency (logarithmic) against answers a second, a point for each run."
    return plot("Latency against throughput", caption, ("answers a second", None), ("latency, ms", 10), drawn)


def _sweep(runs: Sequence[Run]) -> Section:
    drawn: list[Line] = []
    rules, tables = [], []
    for run in runs:
        result, rows = run.result, run.result["rows"]
        for stage in STAGES if len(runs) == 1 else ("forward", "handler"):
            name = _join(run.name, STAGES[stage])
            points = [(row["batch"], row[stage]["ms_per_image"], name) for row in rows if row["error"] is None]
            drawn.append(Line(name, points, len(drawn)))
        rules += [("x", result["knee"], _join("knee", run.name), "dim")] if result["knee"] else []
        rules += [("x", row["batch"], _join(row["error"], run.name), "bad") for row in rows if row["error"]]
        spreads = [{title: _spread(row[stage]) for stage, title in STAGES.items()} for row in rows]
        cells = [{"batch": row["batch"], **own, "": row["error"] or ""} for row, own in zip(rows, spreads, strict=True)]
        marked = [i for i, row in enumerate(rows) if row["batch"] == result["knee"]]
        caption = "Milliseconds a batch, median (quartiles), and an image; marked: the knee, within 5 % of the cheapest"
        tables += _table(_join(caption, run.name), cells, marked)
        keys = ("model", "version", "classes", "device", "precision", "threads", "ended", "fit")
        facts = {key: result[key] for key in keys}
        facts |= {one["what"]: f"not run, {one['why']}" for one in result["not_run"]}
        tables += _facts(_join("The sweep", run.name), [facts], ["value"])
    caption = "Milliseconds per image, medians; each stage includes those before it. Both axes are logarithmic."
    title, x, y = "Milliseconds per image by batch size", ("pictures in a batch", 2), ("ms per image", 10)
    blocks = (plot(title, caption, x, y, drawn, rules), *tables)
    return Section("Batch sweep: what an image costs at each batch size", blocks)


def _spread(timing: Result | None) -> str | None:
    values = {key: number(value) for key, value in (timing or {}).items()}
    return "{median_ms} ({low_ms} to {high_ms}), {ms_per_image}".format_map(values) if values else None


def _tune(runs: Sequence[Run]) -> Section:
    (run,) = runs
    result, goal = run.result, run.result["goal"]
    title, words = "Tuning", {"best": "chosen", "configured": "configured now"}
    if "tuned" in result:
        title, words = "Exhaustive search", {"best": "the best", "tuned": "the tuner's choice"}
    special = {word: _settings(result[key]) for key, word in words.items() if result[key]}
    rows = sorted(result["tried"], key=lambda row: (not row["holds"], -row["per_second"]))
    marks = [", and ".join(word for word, settings in special.items() if settings == _settings(row)) for row in rows]
    points: dict[bool, list[tuple[float, float, str]]] = {True: [], False: []}
    rings = []
    for row, mark in zip(rows, marks, strict=True):
        if row["p95_ms"] is not None:
            points[row["holds"]].append((row["p95_ms"], row["per_second"], _settings(row)))
            rings += [(row["p95_ms"], row["per_second"], mark)] if mark else []
    drawn = [Line("holds the goal", points[True], 0, "none"), Line("does not", points[False], 0, "none", hollow=True)]
    rule = ("y", goal["rate"], f"to hold: {goal['rate']:g}/s", "bad") if "rate" in goal else None
    rule = rule or ("x", goal["p95_ms"], f"budget: p95 {goal['p95_ms']:g} ms", "bad")
    caption = "Requests a second against the 95th percentile (logarithmic). Filled: holds the goal; hollow: does not."
    x, y = ("p95 latency, ms", 10), ("requests a second", None)
    sentence = result["sentence"] + " It was interrupted." * result.get("interrupted", False)
    cells = [{**row, "": mark} for row, mark in zip(rows, marks, strict=True)]
    marked = [i for i, mark in enumerate(marks) if mark]
    # The best of many single turns is partly the luckiest one, so it gets turns of its own.
    again = "The best of the search and the tuner's choice, measured again in turns"
    measured = f"What was measured, {len(rows)} configurations, what holds the goal first"
    blocks = (
        Sentences((sentence,), "lead" if result["holds"] else "bad"),
        plot("Throughput against p95", caption, x, y, drawn, [rule], rings),
        *_table(measured, cells, marked, columns=(*_TRIED, "")),
        *_table(again, result.get("beside", ()), columns=_TRIED),
        *_table("From the batch sweep: n pictures take a ms * n + b ms", result.get("fits", ())),
        *_table("What was not measured, and why", result.get("pruned", ()), words=True),
    )
    return _section(f"{title} of {result['model']}", run, blocks)


def _settings(row: Result) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {row[key]}" for key in _SETTINGS)


def _origin(runs: Sequence[Run]) -> Section:
    facts = [
        {"started (UTC)": each.started, "command": each.command, **each.machine, **each.versions}
        | {f"pictures: {key}": value for key, value in each.pictures.items()}
        for each in (run.record for run in runs)
    ]
    shared = {key: value for key, value in facts[0].items() if all(each.get(key, "") == value for each in facts)}
    apart = [{key: value for key, value in each.items() if key not in shared} for each in facts]
    tables = _facts("What differs", apart, [run.name for run in runs])
    tables += _facts("Machine, versions and pictures", [shared], ["all runs"])
    return Section("How it was measured", tuple(tables))


# Each kind's name, its section, and the keys that tell its runs apart; in the page's order.
_KINDS: dict[str, tuple[str, Callable[[Sequence[Run]], Section], tuple[str, ...]]] = {
    "compare": ("comparison", _compare, ("rounds", "seconds")),
    "load": ("load", _load, ("clients", "rate")),
    "sweep": ("batch sweep", _sweep, ("model", "device", "precision", "threads")),
    "tune": ("tuning", _tune, ("model",)),
    "search": ("exhaustive search", _tune, ("model",)),
}
