"""Reports: one escaped file that loads nothing, in readable colours; charts that are the same each time."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

from beeline.errors import BeelineError
from host import ROOT, report
from host.report import NAMES, Figures, Page, Pictures, Section, Sentences, Table
from host.report.charts import Bar, Line, bars, plot

TEMPLATE = (Path(report.__file__).parent / "report.html.jinja").read_text(encoding="utf-8")
HOSTILE = "</style><script>alert('x')</script> $x$ | é 漢"


def hostile() -> Page:
    """Return a page of every kind of block in which every text is hostile."""
    text = HOSTILE
    lines = [Line(text, [(1, 2, text), (10, 20, text)], 0), Line(text, [(1, 3, text)], 1, "--")]
    rules = [("x", 4.0, text, "dim"), ("y", 9.0, text, "bad")]
    blocks = (
        Figures(((text, text),)),
        Sentences((text,), "lead"),
        Table(text, (text, text), ((text, text),), frozenset([0]), folded=True),
        bars(text, text, [Bar(text, 1.0, text, interval=(0.5, 2.0), dots=(1.0,)), Bar(text, None, text)]),
        plot(text, text, (text, 2), (text, None), lines, rules, [(1, 2, text)]),
        Pictures((("data:image/jpeg;base64,", text, text), (text, text, text))),
    )
    return Page(text, text, (Section(text, blocks),))


def test_every_text_is_escaped_on_the_page_and_in_markdown() -> None:
    html = hostile().html()
    assert "<script" not in html
    assert html.count("</style>") == 1
    assert html.count("&lt;script&gt;") > 30
    assert not re.search(r"(?<!\\)[<|](?=script| é)", hostile().markdown())


def test_a_chart_is_the_same_bytes_whatever_the_configuration_of_matplotlib() -> None:
    first = hostile().html()
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        assert hostile().html() == first


def test_a_charts_colours_are_classes_and_its_text_is_text() -> None:
    line, rule = Line("a", [(1, 2, "tip")], 1, hollow=True), ("x", 3, "b", "bad")
    svg = plot("t", "c", ("x", 10), ("y", None), [line], [rule]).draw()
    assert set(re.findall(r"(?:fill|stroke)-([\w]+)", svg)) >= {"ink", "dim", "panel", "grid", "line", "bad", "s1"}
    assert not re.search(
        r"#[0-9a-f]{3,6}\b(?!\))|url\((?!#)|http|font-family|<style|<metadata", svg.replace('href="#', "")
    )
    assert "<title>tip: 2.00 at 1</title>" in svg
    assert ">b</text>" in svg


@pytest.mark.parametrize(
    ("values", "base", "least"), [([7.3], None, 3), ([0.04], None, 3), ([1, 256], 2, 9), ([1.02, 17.5], 10, 3),
                                  ([0.3, 4000], 10, 3), ([10, 11], 10, 3), ([99], 10, 3), ([], 10, 1)]
)  # fmt: skip
def test_axes_have_a_few_ticks_whatever_the_values(values: list[float], base: int | None, least: int) -> None:
    svg = plot("t", "c", ("", base), ("", None), [Line("", [(value, 1, "") for value in values], 0)]).draw()
    assert least <= svg.count("text-anchor: middle") <= 12


def test_bars_without_a_value_and_no_bars_are_charts_too() -> None:
    assert "not measured" in bars("t", "c", [Bar("a", None, "not measured")]).draw()
    assert "nan" not in bars("t", "c", [Bar("a", 0.0, "0")]).draw()


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(BeelineError, match="cannot be written"):
        report.write("", tmp_path)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_and_series_have_enough_contrast(theme: int) -> None:
    """By the formula of the accessibility guidelines."""
    colours = dict(re.findall(r"--(\w+): (#\w{6});", TEMPLATE.split(":root {")[theme + 1]))
    assert set(NAMES) < set(colours)

    def contrast(one: str, other: str) -> float:
        dark, light = sorted((luminance(colours[one]), luminance(colours[other])))
        return (light + 0.05) / (dark + 0.05)

    for ground in ("ground", "panel"):
        assert all(contrast(name, ground) >= 4.5 for name in ("ink", "dim", "bad"))
        assert all(contrast(name, ground) >= 3 for name in (*(name for name in NAMES if name[0] == "s"), "good"))
    assert contrast("ink", "mark") >= 4.5


def test_only_a_report_imports_the_drawing_libraries() -> None:
    code = "import sys, bench.report, cli.serve, cli.bench; print({'jinja2', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
