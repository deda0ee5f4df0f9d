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
from host.report import Block, Figures, Page, Section, Sentences, Table, number
from host.report.charts import Bar, Line, bars, plot

Result = Mapping[str, Any]
# The stages of a batch sweep; each includes those before it.
_STAGES = {"forward": "forward alone", "copied": "+ copy", "decoded": "+ decode", "handler": "whole handler"}
_PERCENTILES = ("p50", "p95", "p99")
_SETTINGS = ("batch_size", "workers", "max_batch_delay", "threads")
_SERVER = ("threads", "precision", "batch", "workers", "failed", "agreement", "memory_mb", "ready_s", "error")
# Longer tables are closed until somebody opens them.
_LONG = 20


@dataclass(frozen=True)
class Run:
    """A result, its name where there are several of its kind, its place among them (its colour), its file's label."""

    result: Result
    name: str
    number: int
    label: str


def read(paths: Sequence[Path]) -> tuple[list[Record], list[str]]:
    """Return all records, and of each what tells it apart: its file, where there are several.

    Raises:
        BeelineError: for a file that is not there or holds no records.
    """
    often = Counter(path.stem for path in paths)
    records: list[Record] = []
    labels: list[str] = []
    for path in paths:
        found = files.read(path)
        if not found:
            raise BeelineError(f"{path} holds no record; measure with `beeline bench ... --out {path.name}` first")
        name = path.stem if often[path.stem] == 1 else f"{path.parent.name}/{path.stem}"
        records += found
        labels += [name if len(paths) > 1 else ""] * len(found)
    return records, labels


def page(records: Sequence[Record], labels: Sequence[str] | None = None) -> Page:
    """Return the report of records of any kinds; `labels` tell them apart, None where nothing needs to.

    Raises:
        BeelineError: when there is no record.
    """
    if not records:
        raise BeelineError("there is no record to report; measure with `beeline bench ... --out FILE.jsonl` first")
    labels = labels or [""] * len(records)
    groups: dict[tuple[str, str], list[tuple[Record, str]]] = {}
    for record, label in zip(records, labels, strict=True):
        # Tunings of different models are not laid over each other.
        model = record.result["model"] if _kind(record) in ("tune", "search") else ""
        groups.setdefault((_kind(record), model), []).append((record, label))
    sections = [make(_runs(own)) for kind, (_, make) in _KINDS.items() for (of, _), own in groups.items() if of == kind]
    models = ", ".join(dict.fromkeys(str(record.result["model"]) for record in records if record.result.get("model")))
    kinds = ", ".join(dict.fromkeys(_KINDS[_kind(record)][0] for record in records))
    times = sorted(record.started[:16].replace("T", " ") for record in records)
    title = f"Beeline: {kinds} of {models}" if models else f"Beeline: {kinds}"
    facts = f"Measured {' to '.join(dict.fromkeys((times[0], times[-1])))} (UTC)."
    return Page(title, facts, (*sections, _origin(records, labels)))


def _kind(record: Record) -> str:
    """Return what was measured: batch sweeps are called `table` or `sweep`, and so were exhaustive searches."""
    if "knee" in record.result:
        return "table"
    return "search" if record.kind == "sweep" else record.kind


def _describe(record: Record) -> str:
    result, kind = record.result, _kind(record)
    if kind == "load":
        return f"{result['rate']:g} arrivals/s" if result.get("rate") else f"{result['clients']} clients"
    if kind == "compare":
        return f"{result['rounds']} rounds of {result['seconds']:g} s, {result['clients']} clients"
    keys = ("model", "device", "precision", "threads") if kind == "table" else ("model",)
    return ", ".join(f"threads {result[key]}" if key == "threads" else str(result[key]) for key in keys)


def _runs(records: Sequence[tuple[Record, str]]) -> list[Run]:
    """Return records with labels as runs; where there are several, each has a name: its file's, or else what it is."""
    often = Counter(label for _, label in records)
    names = [label if label and often[label] == 1 else _join(label, _describe(record)) for record, label in records]
    counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
    names = [f"{name} ({i})" if names.count(name) > 1 else name for name, i in zip(names, counts, strict=True)]
    return [
        Run(record.result, name if len(records) > 1 else "", i, label)
        for i, ((record, label), name) in enumerate(zip(records, names, strict=True))
    ]


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


def _compare(runs: Sequence[Run]) -> Section:
    """Return bars with intervals, in classes that are never mixed, and every column."""
    blocks: list[Block] = []
    for run in runs:
        again = run.result.get("aa") or {}
        said = "no server was measured twice, so nobody knows what noise looks like here."
        if again.get("ratio"):
            low, high = again["interval"]
            said = (
                f"A/A, the same server entered twice ({again['server']}): {again['verdict']}, {again['ratio']:.2f} "
                f"({low:.2f} to {high:.2f}) of itself. What differs by no more than that is noise."
            )
        tone = "good" if again.get("verdict") == "no difference" else "bad"
        blocks.append(Sentences((_join(run.name, said),), tone))
    every = [(run, row) for run in runs for row in run.result["rows"]]
    for kind in dict.fromkeys(row["class"] for _, row in every):
        # The fastest first, whoever that is; the runs of one server stay together.
        best = Counter[str]()
        for _, row in every:
            best |= Counter({row["server"]: statistics.median(row["per_second"] or [0])})
        rows = [(run, row) for run, row in every if row["class"] == kind]
        rows.sort(key=lambda each: (-best[each[1]["server"]], each[1]["server"], each[0].number))
        caption = (
            f"{kind.capitalize()}: requests a second, the median of the rounds, fastest first; each dot is a round. "
            "Whisker: the interval of the ratio to the server it is compared with. Compare within this chart alone."
        )
        blocks.append(bars(f"Requests a second, servers {kind}", caption, [_bar(run, row) for run, row in rows]))
        for run in runs:
            own = [row for row in run.result["rows"] if row["class"] == kind]
            faster = [i for i, row in enumerate(own) if row["verdict"] == "faster"]
            blocks += _table(_join(f"{kind.capitalize()}, every column", run.name), map(_server, own), faster)
    for run in runs:
        rounds = [*run.result["rows"], *filter(None, [run.result.get("aa")])]
        keys = ("server", "class", "pattern", "per_second", "p95_ms")
        caption = _join("What each server is, and each round; last the server that was entered twice", run.name)
        blocks += _table(caption, ({key: row[key] for key in keys} for row in rounds), words=True)
    return Section("Comparison: the same model, pictures and machine, servers in turn", tuple(blocks))


def _bar(run: Run, row: Result) -> Bar:

    name = f"{row['server']} ({run.name})" if run.name else row["server"]
    if not row["per_second"]:
        return Bar(name, None, "not measured", run.number)
    rate = statistics.median(row["per_second"])
    words, interval = f"{number(rate)}/s", tuple[float, ...]()
    if row["ratio"] and row.get("compared_with") != row["server"]:
        words += f", {row['ratio']:.2f} times, {row['verdict']}"
        interval = tuple(rate * end / row["ratio"] for end in row["interval"])
    return Bar(name, rate, words, run.number, interval, tuple(row["per_second"]))


def _server(row: Result) -> Result:
    """Return a server's medians; without an error it was not its turn yet when somebody ended the comparison."""
    none = "could not be measured" if row["error"] else "not measured"
    p95 = [value for value in row["p95_ms"] if value is not None]
    return {
        "server": row["server"],
        "requests/s": statistics.median(row["per_second"]) if row["per_second"] else none,
        "p95 ms": statistics.median(p95) if p95 else None,
        "ratio": f"{row['ratio']:.2f} ({row['interval'][0]:.2f} to {row['interval'][1]:.2f})" if row["ratio"] else None,
        "verdict": row["verdict"],
        **{key: row[key] for key in _SERVER},
    }


def _load(runs: Sequence[Run]) -> Section:
    """Return rate, latency, what failed, the batch sizes that clients saw, thresholds."""
    blocks: list[Block] = []
    for run in runs:
        backlog = run.result.get("backlog")
        wrong = run.result["client_limited"] or run.result["failed"] or (backlog and backlog["growing"])
        blocks.append(Sentences((_join(run.name, f"{run.result['sentence']}."),), "bad" if wrong else "lead"))
    if len(runs) == 1:
        one = runs[0].result
        figures = [
            (number(one["per_second"]), "answers a second"),
            (str(one["failed"]), f"of {one['requests']} failed"),
        ]
        figures[1:1] = [(_text(one[f"{name}_ms"]), f"ms, {name}") for name in _PERCENTILES]
        counts = sorted((int(size), count) for size, count in one["batch_sizes"].items())
        shares = [(size, count / max(1, sum(one["batch_sizes"].values()))) for size, count in counts]
        drawn = [Bar(f"in batches of {size}", share, f"{share:.1%} of the requests") for size, share in shares]
        caption = "The batch size that came with each answer (X-Batch-Size)."
        blocks += [Figures(tuple(figures)), *([bars("Batch sizes", caption, drawn, 1.0)] if drawn else [])]
    else:
        blocks.append(_curve(runs))
    left_out = ("sentence", "thresholds")
    facts = [{key: value for key, value in run.result.items() if key not in left_out} for run in runs]
    blocks += _facts("Every figure", facts, [run.name or "figure" for run in runs])
    limits = [
        {
            "threshold": _join(run.name, one["text"]),
            "value": one["value"],
            "verdict": "pass" if one["holds"] else "FAIL",
        }
        for run in runs
        for one in run.result["thresholds"]
    ]
    blocks += _table("Fail if", limits, words=True)
    return Section("Load: a running server, from outside", tuple(blocks))


def _curve(runs: Sequence[Run]) -> Block:
    """Return latency against throughput, a point a run: p50, p95 and p99 of one file, p95 of each of several."""
    labels = list(dict.fromkeys(run.label for run in runs))
    lines = [(name, f"{name}_ms", labels[0]) for name in _PERCENTILES]
    if len(labels) > 1:
        lines = [(f"{label}, p95", "p95_ms", label) for label in labels]
    drawn = []
    for series, (name, key, label) in enumerate(lines):
        own = [run for run in runs if run.label == label and run.result[key] is not None]
        points = [(run.result["per_second"], run.result[key], f"{run.name}: {name}") for run in own]
        drawn.append(Line(name, sorted(points), series))
    caption = "Latency (logarithmic) against answers a second, a point a run."
    return plot("Latency against throughput", caption, ("answers a second", None), ("latency, ms", 10), drawn)


def _facts(caption: str, items: Sequence[Result], names: Sequence[str]) -> list[Block]:
    """Return a table with a column an item."""
    keys = dict.fromkeys(key for item in items for key in item)
    rows = tuple((key.replace("_", " "), *(_text(item.get(key)) for item in items)) for key in keys)
    return [Table(caption, ("", *names), rows, words=True)] if rows else []


def _batches(runs: Sequence[Run]) -> Section:
    """Return milliseconds an image against batch, the references over it, and every figure."""
    drawn, rules, tables = [], [], []
    for run in runs:
        result = run.result
        # Only a CUDA device is copied to.
        titles = {**_STAGES, **({"copied": "+ copy to device"} if str(result["device"]).startswith("cuda") else {})}
        rows = [row for row in result["rows"] if row["error"] is None]
        # One run has a line a stage, of several each has two.
        for i, stage in enumerate(("forward", "handler") if run.name else titles):
            points = [(row["batch"], row[stage]["ms_per_image"], _join(run.name, titles[stage])) for row in rows]
            name, dashes = (run.name, ("--", "-")[i]) if run.name else (titles[stage], "-")
            drawn.append(Line("" if dashes == "--" else name, points, run.number if run.name else i, dashes))
        rules += [("x", result["knee"], _join("knee", run.name), "dim")] if result["knee"] else []
        rules += [("x", row["batch"], _join(row["error"], run.name), "bad") for row in result["rows"] if row["error"]]
        cells = [
            {"batch": row["batch"], **{titles[stage]: _spread(row[stage]) for stage in titles}, "": row["error"] or ""}
            for row in result["rows"]
        ]
        what = f"{result['precision']}, threads: {result['threads']}"
        marked = [i for i, row in enumerate(result["rows"]) if row["batch"] == result["knee"]]
        caption = f"Milliseconds a batch, median (quartiles), and per image; {what}; marked: the knee"
        tables += _table(_join(caption, run.name), cells, marked)
        tables += _table(_join("What it says", run.name), _findings(result), words=True)
    for one in runs[0].result["reference"]:
        points = [(batch, each, f"{one['what']}, {one['unit']}") for batch, each in one["points"]]
        drawn.append(Line(one["what"], points, None, "--"))
    caption = (
        "Milliseconds per image, medians; each stage includes those before it. Both axes are logarithmic: equal "
        "distances are equal ratios." + " Solid: the whole handler; dashed: the forward pass alone." * (len(runs) > 1)
    )
    title, x, y = "Milliseconds per image by batch size", ("pictures in a batch", 2), ("ms per image", 10)
    chart = plot(title, caption, x, y, drawn, rules)
    return Section("Batch sweep: what an image costs at each batch size", (chart, *tables))


def _spread(timing: Result | None) -> str | None:
    if timing is None:
        return None
    median, low, high, each = (number(timing[key]) for key in ("median_ms", "low_ms", "high_ms", "ms_per_image"))
    return f"{median} ({low} to {high}), {each}"


def _findings(result: Result) -> list[Result]:
    lines = [("ended by", result["ended"])]
    if result["knee"]:
        lines.insert(0, ("knee", f"batch {result['knee']}, the smallest within 5 % of the cheapest image"))
    for one in result["reference"]:
        points = ", ".join(f"{each:g} at batch {batch}" for batch, each in one["points"])
        worse = f", worse at {one['worse_at']}" if one.get("worse_at") else ""
        lines.append((one["what"], f"{points}{worse} ({one['unit']})"))
    lines += [("shape", sentence) for sentence in result["differences"]]
    lines += [(one["what"], f"not run, {one['why']}") for one in result["not_run"]]
    return [{"about": about, "finding": finding} for about, finding in lines]


def _tune(runs: Sequence[Run]) -> Section:
    """Return throughput against p95 with the goal, what was chosen and why, of one model's tunings or searches."""
    blocks: list[Block] = []
    tables: list[Block] = []
    words, title = {"best": "chosen"}, "Tuning"
    for run in runs:
        result, best = run.result, run.result["best"]
        said, holds = result.get("sentence"), result.get("holds", best and best["holds"])
        if said is None:
            words, title = {"best": "the best", "tuned": "the tuner's choice"}, "Exhaustive search"
            said, holds = f"The best of {len(result['tried'])} configurations: {best and _settings(best)}.", bool(best)
            if result.get("tuned") and best:
                tuned, holds = _settings(result["tuned"]), result["share"] >= 0.95
                said += f" The tuner's choice, {tuned}, reaches {result['share']:.1%} of it."
        blocks.append(Sentences((_join(run.name, said),), "lead" if holds else "bad"))
        if result.get("interrupted"):
            said = "it was interrupted; this is what was known until then."
            blocks.append(Sentences((_join(run.name, said),), "bad"))
        # The best of many single turns is partly the luckiest one.
        caption = _join("The best of the search and the tuner's choice, measured again in turns", run.name)
        tables += _table(caption, map(_configuration, result.get("beside", ())))
        fits = filter(None, result.get("fits") or [result.get("fit")])
        tables += _table(_join("From the batch sweep: n pictures take a ms * n + b ms", run.name), fits)
        tables += _table(_join("What was not measured, and why", run.name), result.get("pruned", ()), words=True)
    return Section(f"{title} of {runs[0].result['model']}", (*blocks, *_tried(runs, words), *tables))


def _tried(runs: Sequence[Run], words: Mapping[str, str]) -> list[Block]:
    """Return the chart of all configurations and a table a run; those under the keys of `words` stand out."""
    drawn, rings, tables = [], [], []
    rules: dict[tuple[str, float, str, str], None] = {}
    for run in runs:
        rows = sorted(run.result["tried"], key=lambda row: (not row["holds"], -row["per_second"]))
        chosen = {word: _settings(run.result[key]) for key, word in words.items() if run.result.get(key)}
        marks = [", and ".join(word for word, of in chosen.items() if of == _settings(row)) for row in rows]
        known = [(row, mark) for row, mark in zip(rows, marks, strict=True) if row["p95_ms"] is not None]
        for holds in (True, False):
            points = [(row["p95_ms"], row["per_second"], _settings(row)) for row, _ in known if row["holds"] is holds]
            drawn.append(Line(run.name if holds else "", points, run.number, "none", not holds))
        rings += [(row["p95_ms"], row["per_second"], _join(mark, run.name)) for row, mark in known if mark]
        for key, value in run.result["goal"].items():
            axis, name = ("x", f"budget: p95 {value:g} ms") if key == "p95_ms" else ("y", f"to hold: {value:g}/s")
            rules[axis, value, name, "bad"] = None
        caption = f"What was measured, {len(rows)} configurations, what holds the goal first"
        cells = [{**_configuration(row), "": mark} for row, mark in zip(rows, marks, strict=True)]
        tables += _table(_join(caption, run.name), cells, [i for i, mark in enumerate(marks) if mark])
    caption = "Requests a second against the 95th percentile (logarithmic). Filled: holds the goal; hollow: does not."
    x, y = ("p95 latency, ms", 10), ("requests a second", None)
    return [plot("Throughput against p95", caption, x, y, drawn, list(rules), rings), *tables]


def _configuration(row: Result) -> Result:
    return {key: row[key] for key in (*_SETTINGS, "per_second", "p95_ms", "failed", "holds")}


def _settings(row: Result) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {row[key]}" for key in _SETTINGS)


def _origin(records: Sequence[Record], labels: Sequence[str]) -> Section:
    """Return the runs, and what they ran on; what they share is said once."""
    named = zip(records, labels, strict=True)
    names = [f"{i}. {_join(label, _describe(record))}" for i, (record, label) in enumerate(named, 1)]
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
    "table": ("batch sweep", _batches),
    "tune": ("tuning", _tune),
    "search": ("exhaustive search", _tune),
}
