"""The report of every kind of record: whole, closed to the network, told in words, the same as Markdown."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from beeline.errors import BeelineError
from bench.record import Record, append
from bench.record import read as read_file
from bench.report import Run, page, read, text
from bench.sweep import STAGES
from cli.bench import app
from host.report import Page, charts, number
from tests.conftest import ROOT

# What the repository keeps, so these records stay readable.
EVERY = {kind: read_file(ROOT / "bench" / "results" / f"{kind}.jsonl") for kind in ("compare", "load", "sweep", "tune")}
COMPARE, LOAD, SWEEP, TUNE = (records[0] for records in EVERY.values())
(SEARCH, *_) = (record for record in EVERY["tune"] if record.kind == "search")


def report(records: list[Record], label: str = "") -> Page:
    return page([Run(record, label) for record in records])


def changed(record: Record, **result: Any) -> Record:
    return replace(record, result={**record.result, **result})


def load(rate: float, **result: Any) -> Record:
    backlog = {"at_end": 812, "growing": True, "per_second": 80.0}
    return changed(LOAD, clients=None, rate=rate, per_second=rate, p95_ms=9000 / rate, backlog=backlog, **result)


@pytest.mark.parametrize("kind", EVERY)
def test_a_page_loads_nothing_and_describes_its_charts_and_its_origin(kind: str) -> None:
    made = report(EVERY[kind])
    html = made.html()
    assert re.search(r"default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-act", html)
    assert not re.search(r"<(script|link|img|iframe|object|a|image)\b|<[^>]* on\w+=|url\((?!#)|@import|\bsrc=", html)
    assert not re.search(r"""href="(?!#)|\bnan\b|<th(?! scope|ead)""", html)
    assert html.count('<svg class="chart" viewBox=') == html.count('role="img"') == html.count("<desc>") > 0
    assert html.count("<table") == html.count("<caption>")
    for said in (unescape(html), made.markdown().replace("\\", "")):
        for record in EVERY[kind]:
            for word in (record.machine["cpu"], record.versions["torch"], record.pictures["sha256"], record.command):
                assert word in said
            assert record.result.get("sentence", "") in said
    assert report(EVERY[kind]).html() == html


def test_a_records_text_is_escaped() -> None:
    hostile = "<script>alert(1)</script>"
    rows = [{**row, "server": f"{row['server']} {hostile}"} for row in COMPARE.result["rows"]]
    records = [
        replace(changed(COMPARE, rows=rows), command=f"beeline {hostile}", versions={hostile: hostile}),
        changed(TUNE, sentence=hostile, model=hostile),
        changed(LOAD, errors={hostile: 1}, statuses={hostile: 1}),
    ]
    made = report(records, hostile)
    assert "<script" not in made.html()
    assert "<script" not in made.markdown().replace("\\<", "")


FAILED = {"batch": 512, "error": "out of memory", "repeats": 0, **dict.fromkeys(STAGES)}
FIRST = f"whole handler: {number(SWEEP.result['rows'][0]['handler']['ms_per_image'])} at 1"
VERDICTS = [{"text": "p95>500ms", "value": 260.0, "holds": True}, {"text": "errors>0", "value": 2.0, "holds": False}]
# The server with the first row's name did not start; the next one won.
ROWS = [dict(row) for row in COMPARE.result["rows"]]
ROWS[0].update(per_second=[], p95_ms=[], ratio=None, interval=None, verdict=None, error="no wheel")
ROWS[1].update(per_second=[20.0, 30.0, 40.0], ratio=2.0, interval=[1.5, 3.0], verdict="faster")


@pytest.mark.parametrize(
    ("records", "labels", "words"),
    [
        ([changed(SWEEP, rows=[*SWEEP.result["rows"], FAILED])], [], [
            FIRST, "knee", "out of memory", "not run, "]),
        ([load(140)], [], ["per second | 140 |", "at end: 812, growing: yes"]),
        ([changed(LOAD, thresholds=VERDICTS, batch_sizes={"1": 1, "8": 3})], [], [
            "p95>500ms | 260 | yes |", "errors>0 | 2.00 | no |", "in batches of 8 75.0% of the requests"]),
        ([load(rate * f) for f in (1, 2) for rate in (30, 90)], ["before"] * 2 + ["after"] * 2, [
            "before: p95: 300 at 30", "after: p95: 150 at 60; after: p95: 50.0 at 180"]),
        ([changed(COMPARE, rows=ROWS)], [], [
            f"{ROWS[0]['server']} could not be measured", "no wheel", f"{ROWS[1]['server']} 30.0/s, 2.00 times, faster",
            "A/A, the same server entered twice", ", again"]),
        ([TUNE], [], ["budget: p95 1000 ms", "chosen", "configured now", "What was not measured, and why"]),
        ([changed(TUNE, goal={"rate": 100.0})], [], ["to hold: 100/s"]),
        ([SEARCH], [], ["reaches ", "the tuner's choice: ", "measured again in turns"]),
    ],
)  # fmt: skip
def test_a_report_has_the_findings(records: list[Record], labels: list[str], words: list[str]) -> None:
    runs = [Run(record, label) for record, label in zip(records, labels or [""] * len(records), strict=True)]
    said = page(runs).markdown().replace("\\", "").replace("**", "")
    assert [word for word in words if word not in said] == []


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (SWEEP, ["* ", "whole handler", f"  {SWEEP.result['ended']}\n"]),
        (changed(COMPARE, rows=ROWS), [f"{ROWS[0]['class'].capitalize()}, medians:", "no wheel", "again"]),
        (TUNE, ["What was measured, ", "configured now", f"and {len(TUNE.result['pruned']) - 20} more"]),
    ],
)
def test_a_terminal_gets_the_tables_and_draws_nothing(
    record: Record, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(charts, "_svg", lambda *given: pytest.fail("it draws"))
    said = text(record)
    assert [word for word in words if word not in said] == []


@pytest.mark.parametrize(("record", "drawn"), [(SWEEP, 1), (LOAD, 1), (TUNE, 2)])
def test_loads_and_sweeps_share_a_chart_and_tunings_do_not(record: Record, drawn: int) -> None:
    assert page([Run(record, "before"), Run(record, "after")]).html().count('class="chart"') == drawn


def test_an_interruption_before_the_first_turn_still_gives_a_report() -> None:
    nothing: dict[str, Any] = {
        "per_second": [],
        "p95_ms": [],
        **dict.fromkeys(("ratio", "interval", "verdict", "error")),
    }
    comparison = changed(COMPARE, rows=[{**row, **nothing} for row in ROWS], aa={**COMPARE.result["aa"], **nothing})
    tuning = changed(TUNE, tried=[], best=None, interrupted=True, sentence="no turn was measured")
    said = report([comparison, tuning]).markdown()
    assert all(words in said for words in ("not measured", "no turn was measured", "It was interrupted"))


def test_several_files_label_their_records(tmp_path: Path) -> None:
    paths = [tmp_path / "one/sweep.jsonl", tmp_path / "two/sweep.jsonl"]
    for path in paths:
        path.parent.mkdir()
        append(path, SWEEP)
    assert [run.label for run in read(paths)] == ["one/sweep", "two/sweep"]
    assert [run.label for run in read(paths[:1])] == [""]
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(BeelineError, match="holds no record"):
        read([tmp_path / "empty.jsonl"])


def test_the_command_writes_what_is_asked_for_or_prints_markdown(tmp_path: Path) -> None:
    path, html, text = tmp_path / "a.jsonl", tmp_path / "new" / "report.html", tmp_path / "report.md"
    append(path, LOAD)
    done = CliRunner().invoke(app, ["report", str(path), "--html", str(html), "--markdown", str(text), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"records": 1, "html": str(html), "markdown": str(text)}
    assert html.read_text().startswith("<!doctype html>")
    assert text.read_text().startswith("# Beeline: load\n")
    assert CliRunner().invoke(app, ["report", str(path)]).stdout.startswith("# Beeline: load\n")
