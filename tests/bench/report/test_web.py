"""The page of every kind of record: whole, closed to the network, told in words, escaped."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from beeline.errors import BeelineError
from bench.record import Record
from bench.report import markdown, page
from tests.bench import fake_records as fake

EVERY: dict[str, Callable[[], list[Record]]] = {
    "table": lambda: [fake.table()],
    "two tables": lambda: [fake.table(), fake.table(4, 3, 64, "bf16", False)],
    "load": lambda: [fake.load()],
    "rates": lambda: [fake.load(rate=rate) for rate in (40, 80, 120, 200)],
    "compare": lambda: [fake.compare()],
    "tune": lambda: [fake.tune()],
    "tune for a rate": lambda: [fake.tune({"rate": 100.0})],
    "sweep": lambda: [fake.sweep()],
    "all": lambda: [fake.table(), fake.load(), fake.compare(), fake.tune(), fake.sweep()],
}
_VOID = {"meta"}


class Reader(HTMLParser):
    """Checks that every element is closed in its turn, and collects what stands in them."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None], str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), self.open[-1] if self.open else ""))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), self.open[-1]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def children(self, parent: str) -> list[str]:
        return [tag for tag, _, inside in self.elements if inside == parent]


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


@pytest.mark.parametrize("kind", EVERY)
def test_a_page_needs_and_may_load_nothing(kind: str) -> None:
    html = page(EVERY[kind]())
    reader = read(html)
    policies = [attrs["content"] for tag, attrs, _ in reader.elements if attrs.get("http-equiv")]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"]
    assert not {tag for tag, _, _ in reader.elements} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "a",
        "image",
        "use",
    }
    assert not re.search(r"url\(|@import|\bsrc=|\bhref=", html)
    assert not any(name.startswith("on") for _, attrs, _ in reader.elements for name in attrs)


@pytest.mark.parametrize("kind", EVERY)
def test_charts_are_told_in_words_and_tables_have_captions(kind: str) -> None:
    reader = read(page(EVERY[kind]()))
    charts = [attrs for tag, attrs, _ in reader.elements if tag == "svg" and attrs.get("class") == "chart"]
    assert charts
    assert all(attrs["role"] == "img" for attrs in charts)
    assert reader.children("svg").count("desc") == len(charts) == reader.children("svg").count("title")
    tables = sum(tag == "table" for tag, _, _ in reader.elements)
    assert tables == reader.children("table").count("caption")
    assert all(attrs.get("scope") for tag, attrs, _ in reader.elements if tag == "th")


@pytest.mark.parametrize("kind", EVERY)
def test_no_figure_leaves_the_drawing(kind: str) -> None:
    html = page(EVERY[kind]())
    assert "nan" not in html.lower().replace("nano", "")
    for points in re.findall(r'points="([^"]+)"', html):
        for x, y in (map(float, point.split(",")) for point in points.split()):
            assert 0 <= x <= 640
            assert 0 <= y <= 380


@pytest.mark.parametrize("kind", EVERY)
def test_both_forms_say_where_the_figures_come_from(kind: str) -> None:
    records = EVERY[kind]()
    for text in (read(page(records)).text, markdown(records).replace("\\", "")):
        for word in ("Fake processor", "2.13.0", fake.PICTURES["sha256"], "amx_bf16", "2026-01-02 03:04"):
            assert str(word) in text
        assert all(record.command in text for record in records)


def test_what_a_record_says_is_text_and_never_markup() -> None:
    hostile = '<img src=x onerror="alert(1)">'
    records = [
        fake.record("compare", fake.compare().result, command=f"beeline {hostile}", versions={hostile: hostile}),
        fake.record("tune", {**fake.tune().result, "sentence": hostile, "model": hostile}),
        fake.load(errors={hostile: 1}, statuses={hostile: 1}),
    ]
    html = page(records, [hostile] * 3)
    reader = read(html)
    assert "img" not in {tag for tag, _, _ in reader.elements}
    assert "<b>flask" not in html.replace("<li><b>", "")
    assert "<img" not in markdown(records, [hostile] * 3).replace("\\<", "")


def test_the_ladder_shows_ours_and_both_references() -> None:
    text = read(page([fake.table()])).text
    assert "ResNet-18, reported by users: 17.5 ms per image at batch 8" in text
    assert "ResNet-101, reported by users: 1.02 ms per image at batch 256" in text
    assert "whole handler: 16.1 ms per image at batch 8" in text
    assert "out of memory" in text
    assert "8 (knee)" in text
    assert "CUDA" in text
    assert "not run, no CUDA device is there" in text


def test_two_files_share_one_chart() -> None:
    html = page([fake.table(), fake.table(4, 3)], ["before", "after"])
    assert html.count('<svg class="chart"') == 1
    text = read(html).text
    assert "before: 18.0 ms per image at batch 1" in text
    assert "after: 7.00 ms per image at batch 1" in text


def test_loads_of_two_files_at_many_rates_are_a_line_a_file() -> None:
    records = [fake.load(rate=rate, scale=scale) for scale in (1, 0.5) for rate in (40, 80, 120)]
    html = page(records, ["before"] * 3 + ["after"] * 3)
    assert html.count("<polyline") == 2
    assert "after: 80 arrivals/s: after, p95 130 ms at 80.0 answers/s" in read(html).text


def test_a_queue_that_grows_and_a_client_at_its_limit_are_said() -> None:
    text = read(page([fake.load(rate=200, growing=True), fake.load(client_limited=True)])).text
    assert "the server does not hold 200/s: the queue grew to 812" in text
    assert "the client was the limit: this says nothing of the server" in text


def test_thresholds_pass_or_fail() -> None:
    text = markdown([fake.load(rate=40)])
    assert "| p95\\>500ms | 260 | pass | 40 arrivals/s |" in text
    assert "| errors\\>0 | 2 | FAIL | 40 arrivals/s |" in text


def test_the_two_classes_of_a_comparison_share_no_chart_and_no_table() -> None:
    html = page([fake.compare()])
    documented, engine = html.split('<svg class="chart"')[1:3]
    documented, engine = documented.split("</svg>")[0], engine.split("</svg>")[0]
    assert "litserve" in documented
    assert "ours-" not in documented
    assert "ours-mosec" in engine
    assert "litserve" not in engine
    tables = {table.split("</span>")[0]: table for table in html.split("<caption><span>")[1:]}
    assert "ours-" not in tables["As documented, every column"].split("</table>")[0]
    assert "litserve" not in tables["Our engine, every column"].split("</table>")[0]


def test_a_peer_that_wins_is_shown_first() -> None:
    engine = page([fake.compare()]).split('<svg class="chart"')[2]
    assert engine.index("ours-mosec") < engine.index("ours-torchserve")


def test_a_server_that_failed_is_listed_with_its_reason() -> None:
    text = read(page([fake.compare()])).text
    assert "its environment cannot be made (no wheel)" in text
    assert "could not be measured" in text


def test_the_same_server_twice_is_said_in_either_case() -> None:
    assert "A/A, the same server entered twice (ours-torchserve): no difference" in read(page([fake.compare()])).text
    result = {**fake.compare().result, "aa": None}
    assert "nobody knows what noise looks like here" in read(page([fake.record("compare", result)])).text


def test_a_tuning_shows_budget_choice_and_what_was_left_out() -> None:
    html = page([fake.tune()])
    text = read(html).text
    assert "budget: p95 500 ms" in text
    assert html.count('class="ring"') == 1
    assert text.count("4 workers on 2 cores take turns") == 15
    assert "to hold: 100/s" in read(page([fake.tune({"rate": 100.0})])).text


def test_a_tuning_without_a_single_turn_is_a_page_too() -> None:
    result = {**fake.tune().result, "tried": [], "best": None, "interrupted": True, "sentence": "no turn was measured"}
    text = read(page([fake.record("tune", result)])).text
    assert "no turn was measured" in text
    assert "it was interrupted" in text


def test_tunings_of_two_models_are_not_laid_over_each_other() -> None:
    assert page([fake.tune(), fake.tune(model="squeezenet")]).count('<svg class="chart"') == 2
    assert page([fake.tune(), fake.tune()]).count('<svg class="chart"') == 1


def test_a_sweep_marks_the_choice_and_its_share() -> None:
    html = page([fake.sweep()])
    assert html.count('class="ring"') == 2
    text = read(html).text
    share = fake.sweep().result["share"]
    assert f"reaches {share:.1%} of the best of 60 configurations" in text
    assert "measured again in turns" in text


def test_without_a_record_there_is_no_report() -> None:
    with pytest.raises(BeelineError, match="no record to report"):
        page([])


def test_the_same_records_give_the_same_page() -> None:
    records = EVERY["all"]()
    assert page(records) == page(records)
