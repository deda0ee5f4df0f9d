"""Records as a report: a section a kind, runs of one kind over each other, and last how they were measured."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beeline.errors import BeelineError
from bench import record as files
from bench.record import Record
from bench.sweep import STAGES
from host.report import Block, Figures, Page, Section, Sentences, Table, number, terminal
from host.report.charts import Bar, Line, bars, plot

Result = Mapping[str, Any]
_PERCENTILES = ("p50", "p95", "p99")
_SETTINGS = ("batch_size", "workers", "max_batch_delay", "threads")
_SERVER = (
    "verdict",
    "threads",
    "precision",
    "batch",
    "workers",
    "failed",
    "agreement",
    "memory_mb",
    "ready_s",
    "error",
)
_KNEE = "the knee, the smallest batch within 5 % of the cheapest image"
# Their runs share a chart.
_LAID_OVER = ("load", "sweep")
# Longer tables are closed until somebody opens them.
_LONG = 20


@dataclass(frozen=True)
class Run:
    """A result, its name where there are several of its kind, and its file's label."""

    result: Result
    name: str = ""
    label: str = ""


def read(paths: Sequence[Path]) -> tuple[list[Record], list[str]]:
    """Return all records, and of each what tells it apart: its file, where there are several.

    Raises:
        BeelineError: for a file that is not there or holds no records.
    """
    records: list[Record] = []
    labels: list[str] = []
    for path in paths:
        own = files.read(path)
        records += own
        labels += ["/".join(path.with_suffix("").parts[-2:]) if len(paths) > 1 else ""] * len(own)
    return records, labels


def page(records: Sequence[Record], labels: Sequence[str] = ()) -> Page:
    """Return the report of records of any kinds; `labels` tell them apart, none where nothing needs to.

    Raises:
        BeelineError: when there is no record.
    """
    if not records:
        raise BeelineError("there is no record to report; measure with `beeline bench ... --out FILE.jsonl` first")
    labels = labels or [""] * len(records)
    pairs = list(zip(records, labels, strict=True))
    names = [
        f"{i}. {label if label and labels.count(label) == 1 else _join(label, _describe(record))}"
        for i, (record, label) in enumerate(pairs, 1)
    ]
    count = Counter(record.kind for record in records)
    sections = []
    for kind, (_, make) in _KINDS.items():
        named = zip(pairs, names, strict=True)
        runs = [
            Run(record.result, name if count[kind] > 1 else "", label)
            for (record, label), name in named
            if record.kind == kind
        ]
        # What another run of a comparison or a tuning found is of another hour, whose speed is another.
        groups = [runs] if kind in _LAID_OVER else [[run] for run in runs]
        sections += [make(group) for group in groups if group]
    models = ", ".join(dict.fromkeys(str(record.result["model"]) for record in records if record.result.get("model")))
    title = f"Beeline: {', '.join(dict.fromkeys(_KINDS[record.kind][0] for record in records))}"
    times = sorted(record.started[:16].replace("T", " ") for record in records)
    facts = f"Measured {' to '.join(dict.fromkeys((times[0], times[-1])))} (UTC)."
    return Page(f"{title} of {models}" if models else title, facts, (*sections, _origin(records, names)))


def text(record: Record) -> str:
    """Return the tables of a record's section for a terminal."""
    return terminal(_KINDS[record.kind][1]([Run(record.result)]).blocks)


def _describe(record: Record) -> str:
    """Return what tells a run from others of its kind."""
    result = record.result
    if record.kind == "load":
        return f"{result['rate']:g} arrivals/s" if result["rate"] else f"{result['clients']} clients"
    if record.kind == "compare":
        return f"{result['rounds']} rounds of {result['seconds']:g} s"
    return ", ".join(str(result[key]) for key in ("model", "device", "precision", "threads") if key in result)


def _join(*parts: str) -> str:
    return ": ".join(filter(None, parts))


def _text(value: object) -> str:
    """Return a value of a record as it stands in a table."""
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')}: {_text(each)}" for key, each in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    return number(value) if value and isinstance(value, float) else str(value)


def _table(caption: str, rows: Iterable[Result], marked: Sequence[int] = (), words: bool = False) -> list[Block]:
    """Return a table whose heads are the first row's keys, and none without rows."""
    rows = list(rows)
    heads = list(rows[0]) if rows else []
    cells = tuple(tuple(_text(row.get(key)) for key in heads) for row in rows)
    names = tuple(head.replace("_", " ") for head in heads)
    return [Table(caption, names, cells, frozenset(marked), len(rows) > _LONG, words)] if rows else []


def _facts(caption: str, items: Sequence[Result], names: Sequence[str]) -> list[Block]:
    """Return a table with a column an item."""
    keys = dict.fromkeys(key for item in items for key in item)
    rows = tuple((key.replace("_", " "), *(_text(item.get(key)) for item in items)) for key in keys)
    return [Table(caption, ("", *names), rows, words=True)] if rows else []


def _compare(runs: Sequence[Run]) -> Section:
    """Return bars with intervals, in classes that are never mixed, and every column."""
    (run,) = runs
    again, rows = run.result["aa"], run.result["rows"]
    said = "No server was measured twice, so nobody knows what noise looks like here."
    if again["ratio"]:
        said = (
            f"A/A, the same server entered twice ({again['server']}): {again['verdict']}, {_ratio(again)} of itself. "
            "What differs by no more than that is noise."
        )
    blocks: list[Block] = [Sentences((said,), "good" if again["verdict"] == "no difference" else "bad")]
    for kind in dict.fromkeys(row["class"] for row in rows):
        # The fastest first, whoever that is.
        own = sorted((row for row in rows if row["class"] == kind), key=_median, reverse=True)
        caption = (
            f"{kind.capitalize()}: requests a second, the median of the rounds, fastest first; each dot is a round. "
            "Whisker: the interval of the ratio to the server it is compared with. Compare within this chart alone."
        )
        blocks.append(bars(f"Requests a second, servers {kind}", caption, list(map(_bar, own))))
        own += [{**again, "server": f"{again['server']}, again"}] if again["class"] == kind else []
        faster = [i for i, row in enumerate(own) if row["verdict"] == "faster"]
        blocks += _table(f"{kind.capitalize()}, every column", map(_server, own), faster)
    keys = ("server", "class", "pattern", "per_second", "p95_ms")
    rounds = [{key: row[key] for key in keys} for row in (*rows, again)]
    blocks += _table("What each server is, and each round; last the server that was entered twice", rounds, words=True)
    title = "Comparison: the same model, pictures and machine, servers in turn"
    return Section(_join(title, run.name), tuple(blocks))


def _median(row: Result) -> float:
    return float(statistics.median(row["per_second"] or [0]))


def _ratio(row: Result) -> str:
    return f"{row['ratio']:.2f} ({row['interval'][0]:.2f} to {row['interval'][1]:.2f})"


def _bar(row: Result) -> Bar:
    if not row["per_second"]:
        return Bar(row["server"], None, "not measured")
    words, interval = f"{number(_median(row))}/s", tuple[float, ...]()
    if row["ratio"] and row["compared_with"] != row["server"]:
        words += f", {row['ratio']:.2f} times, {row['verdict']}"
        interval = tuple(_median(row) * end / row["ratio"] for end in row["interval"])
    return Bar(row["server"], _median(row), words, 0, interval, tuple(row["per_second"]))


def _server(row: Result) -> Result:
    """Return a server's medians; without an error it was not its turn yet when somebody ended the comparison."""
    none = "could not be measured" if row["error"] else "not measured"
    p95 = [value for value in row["p95_ms"] if value is not None]
    return {
        "server": row["server"],
        "requests/s": _median(row) if row["per_second"] else none,
        "p95 ms": statistics.median(p95) if p95 else None,
        "ratio": _ratio(row) if row["ratio"] else None,
        **{key: row[key] for key in _SERVER},
    }


def _load(runs: Sequence[Run]) -> Section:
    """Return rate, latency, what failed, the batch sizes that clients saw, thresholds."""
    blocks: list[Block] = []
    for run in runs:
        backlog = run.result["backlog"]
        wrong = run.result["client_limited"] or run.result["failed"] or (backlog and backlog["growing"])
        blocks.append(Sentences((_join(run.name, f"{run.result['sentence']}."),), "bad" if wrong else "lead"))
    blocks += _one_load(runs[0].result) if len(runs) == 1 else [_curve(runs)]
    left_out = ("sentence", "thresholds")
    facts = [{key: value for key, value in run.result.items() if key not in left_out} for run in runs]
    blocks += _facts("Every figure", facts, [run.name or "figure" for run in runs])
    limits = [(_join(run.name, one["text"]), one) for run in runs for one in run.result["thresholds"]]
    words = {True: "pass", False: "FAIL"}
    rows = [{"threshold": name, "value": one["value"], "verdict": words[one["holds"]]} for name, one in limits]
    return Section("Load: a running server, from outside", (*blocks, *_table("Fail if", rows, words=True)))


def _one_load(one: Result) -> list[Block]:
    figures = [(number(one["per_second"]), "answers a second")]
    figures += [(_text(one[f"{name}_ms"]), f"ms, {name}") for name in _PERCENTILES]
    figures.append((str(one["failed"]), f"of {one['requests']} failed"))
    shares = [(size, count / sum(one["batch_sizes"].values())) for size, count in one["batch_sizes"].items()]
    drawn = [Bar(f"in batches of {size}", share, f"{share:.1%} of the requests") for size, share in shares]
    caption = "The batch size that came with each answer (X-Batch-Size)."
    return [Figures(tuple(figures)), *([bars("Batch sizes", caption, drawn, 1.0)] if drawn else [])]


def _curve(runs: Sequence[Run]) -> Block:
    """Return latency against throughput, a point a run, three lines a file."""
    drawn: list[Line] = []
    for label in dict.fromkeys(run.label for run in runs):
        for name in _PERCENTILES:
            own = [run for run in runs if run.label == label and run.result[f"{name}_ms"] is not None]
            points = [(run.result["per_second"], run.result[f"{name}_ms"], f"{run.name}: {name}") for run in own]
            drawn.append(Line(_join(label, name), sorted(points), len(drawn)))
    caption = "Latency (logarithmic) against answers a second, a point a run."
    return plot("Latency against throughput", caption, ("answers a second", None), ("latency, ms", 10), drawn)


def _sweep(runs: Sequence[Run]) -> Section:
    """Return milliseconds an image against batch, the references over it, and every figure."""
    drawn: list[Line] = []
    rules, tables = [], []
    for run in runs:
        result = run.result
        rows = [row for row in result["rows"] if row["error"] is None]
        for stage in STAGES if len(runs) == 1 else ("forward", "handler"):
            name = _join(run.name, STAGES[stage])
            drawn.append(Line(name, [(row["batch"], row[stage]["ms_per_image"], name) for row in rows], len(drawn)))
        rules += [("x", result["knee"], _join("knee", run.name), "dim")] if result["knee"] else []
        rules += [("x", row["batch"], _join(row["error"], run.name), "bad") for row in result["rows"] if row["error"]]
        cells = [
            {
                "batch": row["batch"],
                **{title: _spread(row[stage]) for stage, title in STAGES.items()},
                "": row["error"] or "",
            }
            for row in result["rows"]
        ]
        marked = [i for i, row in enumerate(result["rows"]) if row["batch"] == result["knee"]]
        what = f"{result['model']} {result['version']}, {result['classes']} classes, on {result['device']}"
        what += f" in {result['precision']}, threads: {result['threads']}"
        caption = f"Milliseconds a batch, median (quartiles), and per image; {what}; marked: {_KNEE}"
        tables += _table(_join(caption, run.name), cells, marked)
        lines = [("ended by", result["ended"]), *(("shape", sentence) for sentence in result["differences"])]
        lines += [(one["what"], f"not run, {one['why']}") for one in result["not_run"]]
        findings = [{"about": about, "finding": finding} for about, finding in lines]
        tables += _table(_join("What it says", run.name), findings, words=True)
    for one in runs[0].result["reference"]:
        drawn.append(Line(one["what"], [(*point, one["what"]) for point in one["points"]], None, "--"))
    caption = (
        "Milliseconds per image, medians; each stage includes those before it. Both axes are logarithmic: equal "
        "distances are equal ratios."
    )
    title, x, y = "Milliseconds per image by batch size", ("pictures in a batch", 2), ("ms per image", 10)
    chart = plot(title, caption, x, y, drawn, rules)
    return Section("Batch sweep: what an image costs at each batch size", (chart, *tables))


def _spread(timing: Result | None) -> str | None:
    if timing is None:
        return None
    median, low, high, each = (number(timing[key]) for key in ("median_ms", "low_ms", "high_ms", "ms_per_image"))
    return f"{median} ({low} to {high}), {each}"


def _tune(runs: Sequence[Run]) -> Section:
    """Return throughput against p95 with the goal, what was chosen and why, of a tuning or an exhaustive search."""
    (run,) = runs
    result = run.result
    title, words = "Tuning", {"best": "chosen", "configured": "configured now"}
    if "tuned" in result:
        title, words = "Exhaustive search", {"best": "the best", "tuned": "the tuner's choice"}
    special = {word: _settings(result[key]) for key, word in words.items() if result[key]}
    rows = sorted(result["tried"], key=lambda row: (not row["holds"], -row["per_second"]))
    marks = [", and ".join(word for word, of in special.items() if of == _settings(row)) for row in rows]
    known = [(row, mark) for row, mark in zip(rows, marks, strict=True) if row["p95_ms"] is not None]
    points: dict[bool, list[tuple[float, float, str]]] = {True: [], False: []}
    for row, _ in known:
        points[row["holds"]].append((row["p95_ms"], row["per_second"], _settings(row)))
    drawn = [Line("holds the goal", points[True], 0, "none"), Line("does not", points[False], 0, "none", hollow=True)]
    rings = [(row["p95_ms"], row["per_second"], mark) for row, mark in known if mark]
    goal = result["goal"]
    rule = ("y", goal["rate"], f"to hold: {goal['rate']:g}/s", "bad") if "rate" in goal else None
    rule = rule or ("x", goal["p95_ms"], f"budget: p95 {goal['p95_ms']:g} ms", "bad")
    caption = "Requests a second against the 95th percentile (logarithmic). Filled: holds the goal; hollow: does not."
    x, y = ("p95 latency, ms", 10), ("requests a second", None)
    said = result["sentence"] + " It was interrupted." * result.get("interrupted", False)
    cells = [{**_configuration(row), "": mark} for row, mark in zip(rows, marks, strict=True)]
    marked, beside = [i for i, mark in enumerate(marks) if mark], map(_configuration, result.get("beside", ()))
    blocks = (
        Sentences((said,), "lead" if result["holds"] else "bad"),
        plot("Throughput against p95", caption, x, y, drawn, [rule], rings),
        *_table(f"What was measured, {len(rows)} configurations, what holds the goal first", cells, marked),
        # The best of many single turns is partly the luckiest one.
        *_table("The best of the search and the tuner's choice, measured again in turns", beside),
        *_table("From the batch sweep: n pictures take a ms * n + b ms", result.get("fits", ())),
        *_table("What was not measured, and why", result.get("pruned", ()), words=True),
    )
    return Section(_join(f"{title} of {result['model']}", run.name), blocks)


def _configuration(row: Result) -> Result:
    keys = (*_SETTINGS, "per_second", "p95_ms", "failed", "batch", "turns", "holds")
    return {key: row[key] for key in keys if key in row}


def _settings(row: Result) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {row[key]}" for key in _SETTINGS)


def _origin(records: Sequence[Record], names: Sequence[str]) -> Section:
    """Return the runs, and what they ran on; what they share is said once."""
    facts = [
        {"started (UTC)": each.started, "command": each.command, **each.machine, **each.versions}
        | {f"pictures: {key}": value for key, value in each.pictures.items()}
        for each in records
    ]
    shared = {key: value for key, value in facts[0].items() if all(each.get(key, "") == value for each in facts)}
    apart = [{key: value for key, value in each.items() if key not in shared} for each in facts]
    tables = _facts("What differs", apart, names)
    tables += _facts("Machine, versions and pictures", [shared], ["all runs"])
    return Section("How it was measured", tuple(tables))


# What each kind is called, and its section; in the page's order.
_KINDS: dict[str, tuple[str, Callable[[Sequence[Run]], Section]]] = {
    "compare": ("comparison", _compare),
    "load": ("load", _load),
    "sweep": ("batch sweep", _sweep),
    "tune": ("tuning", _tune),
    "search": ("exhaustive search", _tune),
}
