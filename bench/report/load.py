"""The section of loads: rate, latency, what failed, the batch sizes that clients saw, thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.ladder.text import number
from bench.report.axis import Axis
from bench.report.bars import Bar, lying
from bench.report.block import Block, Chart, Figures, Key, Section, Sentences, Table
from bench.report.plot import Plot
from bench.report.run import Run

_PERCENTILES = ("p50", "p95", "p99")
# More runs than this are a curve; their bars would be a wall.
_BARS = 3


def section(runs: Sequence[Run]) -> Section:
    """Return the section of all loads, overlaid."""
    blocks: list[Block] = []
    blocks += [_verdict(run, alone=len(runs) == 1) for run in runs]
    if len(runs) == 1:
        blocks.insert(0, _figures(runs[0].result))
    if len(runs) > _BARS:
        blocks.append(_curve(runs))
    else:
        blocks.append(_percentiles(runs))
        blocks += [_histogram(runs)] if any(run.result["batch_sizes"] for run in runs) else []
    blocks += [_table(runs), *_thresholds(runs)]
    return Section("Load: a running server, from outside", tuple(blocks))


def _figures(result: Mapping[str, Any]) -> Figures:
    return Figures(
        (
            (number(result["per_second"]), "answers a second"),
            *((_ms(result[f"{name}_ms"]), name) for name in _PERCENTILES),
            (str(result["failed"]), f"of {result['requests']} requests failed"),
        )
    )


def _verdict(run: Run, alone: bool) -> Sentences:
    """Return the sentence of a load."""
    result = run.result
    name = "" if alone else f"{run.name}: "
    backlog = result.get("backlog")
    wrong = result["client_limited"] or result["failed"] or (backlog and backlog["growing"])
    return Sentences((f"{name}{_sentence(result)}.",), "bad" if wrong else "lead")


def _sentence(result: Mapping[str, Any]) -> str:
    """Return the record's own sentence, or what must not be overlooked where it has none."""
    if result.get("sentence"):
        return str(result["sentence"])
    backlog = result.get("backlog")
    said = f"{number(result['per_second'])} answers a second, {result['failed']} of {result['requests']} failed"
    if result["client_limited"]:
        return f"{said}; the client was the limit: this says nothing of the server"
    if backlog and backlog["growing"]:
        return f"{said}; the server does not hold {result['rate']:g}/s: the queue grew to {backlog['at_end']}"
    return said


def _percentiles(runs: Sequence[Run]) -> Chart:
    bars = [
        Bar(
            name if len(runs) == 1 else f"{name}, {run.name}",
            run.result[f"{name}_ms"],
            _ms(run.result[f"{name}_ms"]),
            run.number,
        )
        for name in (*_PERCENTILES, "max")
        for run in runs
    ]
    told = "; ".join(f"{bar.name} {bar.text}" for bar in bars)
    caption = "Latency of the answers with status 200" + (
        "; at a rate it counts from the moment each request was due."
        if any(run.result.get("rate") for run in runs)
        else "."
    )
    return Chart(lying("Percentiles of latency", told, bars), caption, told)


def _curve(runs: Sequence[Run]) -> Chart:
    """Return latency against throughput: a point a run, joined in the order of throughput.

    Of one file all percentiles are drawn, of several files only p95, each file a line.
    """
    files = list(dict.fromkeys(run.label for run in runs))
    lines = [(name, list(runs), f"{name}_ms") for name in _PERCENTILES]
    if len(files) > 1:
        lines = [(f"{label}, p95", [run for run in runs if run.label == label], "p95_ms") for label in files]
    ordered = [
        (
            name,
            sorted(
                (run.result["per_second"], run.result[key], run.name) for run in some if run.result[key] is not None
            ),
        )
        for name, some, key in lines
    ]
    plot = Plot(
        "Latency against throughput",
        "; ".join(f"{one.name}: {number(one.result['per_second'])}/s, p95 {_ms(one.result['p95_ms'])}" for one in runs),
        Axis.linear("answers a second", [run.result["per_second"] for run in runs]),
        Axis.decades("latency, ms", [value for _, points in ordered for _, value, _ in points]),
    )
    for series, (name, points) in enumerate(ordered):
        plot.line([(rate, value) for rate, value, _ in points], series)
        for rate, value, run in points:
            plot.marker((rate, value), series, f"{run}: {name} {_ms(value)} at {number(rate)} answers/s")
    keys = tuple(Key(series, name) for series, (name, _) in enumerate(ordered))
    return Chart(plot.svg(), "Latency (logarithmic) against answers a second, a point a run.", plot.told, keys)


def _histogram(runs: Sequence[Run]) -> Chart:
    shares = [_shares(run.result["batch_sizes"]) for run in runs]
    sizes = sorted({size for share in shares for size in share})
    plot = Plot(
        "Batch sizes that requests were answered in",
        "; ".join(
            f"{run.name}: mostly {max(share, key=share.__getitem__)}"
            for run, share in zip(runs, shares, strict=True)
            if share
        ),
        Axis("pictures in the batch", 0, 1, ()),
        Axis.linear("% of the requests", [100 * value for share in shares for value in share.values()]),
    )
    plot.names([str(size) for size in sizes])
    width = 0.8 / len(runs)
    for place, size in enumerate(sizes):
        for run, share in zip(runs, shares, strict=True):
            left = place + 0.1 + run.number * width
            tip = f"{run.name}: {share.get(size, 0):.1%} in batches of {size}"
            ends = left / len(sizes), (left + width) / len(sizes)
            plot.column(*ends, 100 * share.get(size, 0), run.number, tip)
    keys = tuple(Key(run.number, run.name) for run in runs) if len(runs) > 1 else ()
    return Chart(plot.svg(), "The batch size that came with each answer (X-Batch-Size).", plot.told, keys)


def _shares(counts: Mapping[str, int]) -> dict[int, float]:
    total = sum(counts.values())
    return {int(size): count / total for size, count in counts.items()} if total else {}


def _most(counts: Mapping[str, int]) -> list[tuple[int, float]]:
    """Return the most frequent batch sizes."""
    return sorted(_shares(counts).items(), key=lambda each: -each[1])[:3]


def _table(runs: Sequence[Run]) -> Table:
    columns = [_column(run.result) for run in runs]
    rows = tuple((name, *(column[name] for column in columns)) for name in columns[0])
    return Table("Every figure", ("", *(run.name for run in runs)), rows)


def _column(one: Mapping[str, Any]) -> dict[str, str]:
    """Return one run's figures by their names."""
    return {
        "load": f"{one['rate']:g} arrivals/s" if one.get("rate") else f"{one['clients']} clients",
        "measured for": f"{one['seconds']:g} s",
        "answers a second": number(one["per_second"]),
        "with status 200": number(one["good_per_second"]),
        **{name: _ms(one[f"{name}_ms"]) for name in (*_PERCENTILES, "max")},
        "failed": f"{one['failed']} of {one['requests']}",
        "batch sizes": ", ".join(f"{size} ({part:.0%})" for size, part in _most(one["batch_sizes"])) or "-",
        "statuses": _counts(one["statuses"]),
        "errors": _counts(one["errors"]),
        **{f"{stage}, median": _ms(one["timing_ms"].get(stage)) for stage in ("queue", "decode", "forward", "encode")},
        "client, of one core": f"{one['client_cpu']:.0%}",
        "client alone": f"{number(one['ceiling_per_second'])}/s",
        "another tool": _checked(one.get("crosscheck")),
        "waiting at the end": str(one["backlog"]["at_end"]) if one.get("backlog") else "-",
    }


def _checked(found: Mapping[str, Any] | None) -> str:
    if not found:
        return "not asked"
    return f"{found['tool']}: {number(found['per_second'])}/s, ours {found['ratio']:.3f} of it"


def _thresholds(runs: Sequence[Run]) -> list[Block]:
    rows = tuple(
        (
            each["text"],
            "not measured" if each["value"] is None else f"{each['value']:g}",
            "pass" if each["holds"] else "FAIL",
            run.name,
        )
        for run in runs
        for each in run.result["thresholds"]
    )
    return [Table("Fail if", ("threshold", "value", "verdict", "run"), rows, words=True)] if rows else []


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items()) or "none"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{number(value)} ms"
