"""The report of every kind of record: whole, closed to the network, told in words, the same as Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest
from typer.testing import CliRunner

from beeline.errors import BeelineError
from bench.record import Record, append
from bench.report import page, read, text
from cli.bench import app
from host.report import charts
from tests.bench import fake_records as fake

EVERY: dict[str, Callable[[], list[Record]]] = {
    "one batch sweep and one load": lambda: [fake.sweep(), fake.load()],
    "two batch sweeps": lambda: [fake.sweep(), fake.sweep(4, 3, device="cuda")],
    "rates": lambda: [fake.load(rate=rate) for rate in (40, 80, 120, 200)],
    "comparison": lambda: [fake.compare()],
    "tuning and search": lambda: [fake.tune({"rate": 100.0}), fake.search()],
}


@pytest.mark.parametrize("kind", EVERY)
def test_a_page_loads_nothing_says_in_words_what_it_draws_and_where_it_is_from(kind: str) -> None:
    made = page(EVERY[kind]())
    html = made.html()
    assert re.search(r"default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-act", html)
    assert not re.search(r"<(script|link|img|iframe|object|a|image)\b|<[^>]* on\w+=|url\((?!#)|@import|\bsrc=", html)
    assert not re.search(r"""href="(?!#)|\bnan\b|<th(?! scope|ead)""", html)
    assert html.count('<svg class="chart" viewBox=') == html.count('role="img"') == html.count("<desc>") > 0
    assert html.count("<table") == html.count("<caption>")
    for said in (unescape(html), made.markdown().replace("\\", "")):
        for word in ("Fake processor", "2.13.0", fake.PICTURES["sha256"], "amx_bf16", "2026-01-02 03:04"):
            assert str(word) in said
        assert all(record.command in said for record in EVERY[kind]())
    assert page(EVERY[kind]()).html() == html


def test_what_a_record_says_is_text_and_never_markup() -> None:
    hostile = "<script>alert(1)</script>"
    records = [
        fake.record("compare", fake.compare().result, command=f"beeline {hostile}", versions={hostile: hostile}),
        fake.record("tune", {**fake.tune().result, "sentence": hostile, "model": hostile}),
        fake.load(errors={hostile: 1}, statuses={hostile: 1}),
    ]
    made = page(records, [hostile] * 3)
    assert not re.search("<script|<b>flask", made.html())
    assert "<script" not in made.markdown().replace("\\<", "")


@pytest.mark.parametrize(
    ("records", "labels", "words"),
    [
        ([fake.sweep()], [], [
            "ResNet-18, reported by users: 17.5 at 8", "whole handler: 21.3 at 1", "out of memory",
            "theirs gets faster, ours does not", "not run, no CUDA device is there"]),
        ([fake.load(rate=200, growing=True)], [], ["140 answers a second", "at end: 812, growing: yes"]),
        ([fake.load()], [], ["| p95>500ms | 260 | pass |", "| errors>0 | 2.00 | FAIL |", "in batches of 8 87.1%"]),
        ([fake.load(rate=40 * i, scale=2 / f) for f in (2, 4) for i in (1, 2, 3)], ["before"] * 3 + ["after"] * 3, [
            "before: p95: 260 at 40", "after: p95: 130 at 40; after: p95: 130 at 120"]),
        ([fake.compare()], [], [
            "mosec 26.2/s, 2.24 times, faster", "its environment cannot be made (no wheel)", "could not be measured",
            "A/A, the same server entered twice (ours-torchserve): no difference", "ours-torchserve, again"]),
        ([fake.tune()], [], [
            "budget: p95 500 ms", "chosen: ", "configured now: ", "batch size 2 |", "24 configurations"]),
        ([fake.search()], [], ["reaches ", "; the tuner's choice: ", "measured again in turns"]),
    ],
)  # fmt: skip
def test_a_report_says(records: list[Record], labels: list[str], words: list[str]) -> None:
    said = page(records, labels).markdown().replace("\\", "").replace("**", "")
    assert [word for word in words if word not in said] == []


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (fake.sweep(), ["* ", "whole handler", "out of memory", "ended by  out of memory"]),
        (fake.compare(), ["As documented, every column:", "mosec", "could not be measured", "ours-torchserve, again"]),
        (
            fake.tune(),
            ["What was measured, 24 configurations", "configured now", "and 10 more", "4 workers on 2 cores"],
        ),
    ],
)
def test_a_terminal_gets_the_tables_and_draws_nothing(
    record: Record, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(charts, "_svg", lambda *given: pytest.fail("it draws"))
    said = text(record)
    assert [word for word in words if word not in said] == []


@pytest.mark.parametrize(
    ("records", "drawn"),
    [
        ([fake.sweep(), fake.sweep(4, 3)], 1),
        ([fake.load(), fake.load()], 1), ([fake.tune(), fake.tune()], 2),
    ],
)  # fmt: skip
def test_loads_and_sweeps_share_a_chart_and_tunings_do_not(records: list[Record], drawn: int) -> None:
    assert page(records, ["before", "after"]).html().count('class="chart"') == drawn


def test_what_was_interrupted_before_its_first_turn_is_a_report_too() -> None:
    comparison = fake.compare()
    for row in comparison.result["rows"][1:]:
        row.update(per_second=[], p95_ms=[], ratio=None, interval=None, verdict=None, error=None)
    result = {**fake.tune().result, "tried": [], "best": None, "interrupted": True, "sentence": "no turn was measured"}
    said = page([comparison, fake.record("tune", result)]).markdown()
    assert all(words in said for words in ("litserve not measured", "no turn was measured", "It was interrupted"))


def test_without_a_record_there_is_no_report(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(BeelineError, match="holds no record"):
        read([tmp_path / "empty.jsonl"])
    with pytest.raises(BeelineError, match="no record to report"):
        page([])


def test_records_are_told_apart_by_their_files_where_there_are_several(tmp_path: Path) -> None:
    paths = [tmp_path / "one/sweep.jsonl", tmp_path / "two/sweep.jsonl"]
    for path in paths:
        append(path, fake.sweep())
    assert read(paths)[1] == ["one/sweep", "two/sweep"]
    assert read(paths[:1])[1] == [""]


def test_the_command_writes_what_is_asked_for_or_prints_markdown(tmp_path: Path) -> None:
    path, html, text = tmp_path / "a.jsonl", tmp_path / "new" / "report.html", tmp_path / "report.md"
    append(path, fake.load())
    done = CliRunner().invoke(app, ["report", str(path), "--html", str(html), "--markdown", str(text), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"records": 1, "html": str(html), "markdown": str(text)}
    assert html.read_text().startswith("<!doctype html>")
    assert text.read_text().startswith("# Beeline: load\n")
    assert CliRunner().invoke(app, ["report", str(path)]).stdout.startswith("# Beeline: load\n")
