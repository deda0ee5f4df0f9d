"""Charts as SVG by matplotlib: every colour is a CSS class, so one drawing suits the light and the dark theme."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any

from host.report import NAMES, Chart, number

# The functions that draw import matplotlib themselves, because that takes half a second.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Transform

# In pixels: a chart's width, and the space left, right, above and below of its axes.
_WIDTH, _EDGES = 640, (66, 18, 34, 58)
# The same marks as `GLYPHS` in the legend.
_MARKS = "osD^"
# matplotlib draws in these stand-ins, `_classes` turns them into CSS classes, the template has the real colours.
_COLOURS = {name: f"#0000{i:02x}" for i, name in enumerate(NAMES, 1)}
_CLASSES = {colour: name for name, colour in _COLOURS.items()}
_RC = {
    **dict.fromkeys(("text.color", "xtick.labelcolor", "ytick.labelcolor"), _COLOURS["ink"]),
    **dict.fromkeys(("axes.spines.left", "axes.spines.right", "axes.spines.top", "xtick.bottom", "ytick.left"), False),
    **{"axes.edgecolor": _COLOURS["line"], "grid.color": _COLOURS["grid"], "axes.axisbelow": True, "font.size": 12},
    **{"svg.hashsalt": "beeline", "svg.fonttype": "none", "text.parse_math": False, "lines.linewidth": 2.2},
}


@dataclass(frozen=True)
class Bar:
    """A name, a value from 0 (None where there is none), its words, an interval, single measurements as dots."""

    name: str
    value: float | None
    text: str
    interval: tuple[float, ...] = ()
    dots: tuple[float, ...] = ()


@dataclass(frozen=True)
class Line:
    """Points (x, y, what shows under a pointer) of a series; `dashes` is `-`, `--` or `none`."""

    name: str
    points: Sequence[tuple[float, float, str]]
    series: int
    dashes: str = "-"
    hollow: bool = False


def bars(title: str, caption: str, rows: Sequence[Bar], least: float = 0.0) -> Chart:
    """Return bars on one scale from 0 to `least` or more, each below its words, so that names fit on a phone."""
    # A line holds 52 letters at the size of a phone's text.
    lines = [1 if len(bar.name) + len(bar.text) <= 52 else 2 for bar in rows]
    most = max([least, *(value for bar in rows for value in (bar.value or 0, *bar.interval, *bar.dots))]) or 1.0
    height = sum(26 * count + 34 for count in lines)

    def paint(axes: Axes) -> None:
        axes.axis("off")
        axes.set(xlim=(0, most), ylim=(height, 0))
        top, ink = 0, _COLOURS["ink"]
        for bar, count in zip(rows, lines, strict=True):
            y = top + 26 * count + 10
            axes.text(0, top + 20, bar.name, weight="bold")
            axes.text(most, y - 16, bar.text, ha="right")
            axes.barh(y, most, 1 if bar.value is None else 16, color=_COLOURS["grid"])
            axes.barh(y, bar.value or 0, 16, color=_COLOURS["s0"], gid=f"tip:{bar.name}: {bar.text}")
            axes.plot(bar.interval, [y] * len(bar.interval), "|-", c=ink, lw=1.6, ms=11, clip_on=False)
            axes.plot(bar.dots, [y + 13] * len(bar.dots), "o", c=ink, ms=5, mew=0, clip_on=False)
            top += 26 * count + 34

    words = "; ".join(f"{bar.name} {bar.text}" for bar in rows)
    return Chart(partial(_svg, title, words, paint, height, (4, 12, 0, 0)), caption, words)


def plot(
    title: str,
    caption: str,
    x: tuple[str, int | None],
    y: tuple[str, int | None],
    lines: Sequence[Line],
    rules: Sequence[tuple[str, float, str, str]] = (),
    rings: Sequence[tuple[float, float, str]] = (),
) -> Chart:
    """Return lines over two axes, each with a title and the base of its logarithm; None is linear from 0.

    `rules` are limits: the axis (`x` or `y`), the value, the words, the name of the colour. `rings` are points that
    stand out, with their words.
    """

    def paint(axes: Axes) -> None:
        for i, (which, (name, base)) in enumerate((("x", x), ("y", y))):
            values: list[Any] = [point[i] for line in lines for point in line.points]
            _scale(axes, which, name, [*values, *(rule[1] for rule in rules if rule[0] == which)], base)
        for i, (which, value, text, name) in enumerate(rules):
            look: Any = {"color": _COLOURS[name], "linewidth": 1.5, "dashes": (5, 3)}
            if which == "x":
                axes.axvline(value, **look)
                _note(axes, (value, 0), text, 6, 9 + 22 * i, name, axes.get_xaxis_transform())
            else:
                axes.axhline(value, **look)
                _note(axes, (1, value), text, 6, 7, name, axes.get_yaxis_transform())
        for line in lines:
            _line(axes, line)
        for i, (across, up, text) in enumerate(rings):
            axes.plot(across, up, "o", ms=17, mfc="none", mec=_COLOURS["ink"], mew=2, clip_on=False)
            _note(axes, (across, up), text, 0, -28 if i % 2 else 15, "ink", axes.transData)

    named = [line for line in lines if line.name and line.points]
    ends = [(line.name, *line.points[i][:2]) for line in named for i in (0, -1)]
    ends += [(text, across, up) for across, up, text in rings]
    points = [f"{name}: {number(up)} at {across:.6g}" for name, across, up in ends]
    words = "; ".join([*points, *(text for *_, text, _ in rules)])
    keys = tuple((line.series, line.name) for line in named)
    return Chart(partial(_svg, title, words, paint, 380, _EDGES), caption, words, keys)


def _line(axes: Axes, line: Line) -> None:
    own, panel = _COLOURS[f"s{line.series % 6}"], _COLOURS["panel"]
    axes.plot([x for x, *_ in line.points], [y for _, y, _ in line.points], ls=line.dashes, color=own)
    look: Any = {"mfc": panel if line.hollow else own, "mec": own if line.hollow else panel, "ms": 8, "mew": 1.4}
    for x, y, tip in line.points:
        axes.plot(x, y, _MARKS[line.series % 4], **look, clip_on=False, gid=f"tip:{tip}: {number(y)} at {x:.6g}")


def _scale(axes: Axes, which: str, title: str, values: Sequence[float], base: int | None) -> None:
    from matplotlib import ticker

    known = [value for value in values if value > 0] or [1.0]
    low, high = min(known) / 1.15, max(known) * 1.15
    locator: ticker.Locator = ticker.MaxNLocator(6)
    if base == 2 or (base and high / low >= 10):
        locator = ticker.LogLocator(base, (1, 2, 5) if base == 10 and high / low < 1000 else (1,), numticks=11)
    axes.set(**{f"{which}scale": "log" if base else "linear", f"{which}lim": (low if base else 0, high)})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set(major_locator=locator, minor_locator=ticker.NullLocator(), major_formatter="{x:,.10g}")
    axis.grid(which == "y")
    across, up, side = (1, -0.17, "right") if which == "x" else (-0.11, 1.05, "left")
    axes.text(across, up, title, transform=axes.transAxes, ha=side, color=_COLOURS["dim"])


def _note(axes: Axes, point: tuple[float, float], text: str, right: float, up: float, name: str, of: Transform) -> None:
    """Write text so many pixels to the right of a point and above it; in the right half of a chart to its left."""
    left = (of + axes.transAxes.inverted()).transform(point)[0] > 0.5
    axes.annotate(text, point, (-right if left else right, up), of, "offset points", color=_COLOURS[name],
                  ha="right" if left else "left", va="baseline", annotation_clip=False)  # fmt: skip


def _svg(title: str, description: str, paint: Callable[[Axes], None], height: float, edges: Sequence[float]) -> str:
    """Return what `paint` draws in `_COLOURS`; the same calls give the same bytes."""
    from matplotlib import style
    from matplotlib.figure import Figure

    left, right, top, bottom = edges
    file = StringIO()
    with style.context(["default", _RC]), warnings.catch_warnings():
        # Text stays text: the browser has the letters that matplotlib's font lacks.
        warnings.filterwarnings("ignore", r"(?s)Glyph .* missing from")
        figure = Figure(figsize=(_WIDTH / 72, height / 72))
        size = (_WIDTH - left - right) / _WIDTH, (height - top - bottom) / height
        paint(figure.add_axes((left / _WIDTH, bottom / height, *size)))
        nothing: Any = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    # Without the style, which would apply to the whole page, and without the ids of groups, which are the same in each
    # chart. A tip in an id becomes the title of its group.
    body = re.sub(r'(?s)^.*?<svg.*?>|<style.*?</style>| transform="rotate\(-0[^"]*"', "", file.getvalue())
    body = re.sub(r'<g id="tip:([^"]*)">', r"<g><title>\1</title>", body)
    body = re.sub(r'style="([^"]*)"', _classes, re.sub(r'<g id="[^"]*">', "<g>", body))
    words = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    return f'<svg class="chart" viewBox="0 0 {_WIDTH} {height:g}" role="img">{words}{body}'


def _classes(match: re.Match[str]) -> str:
    """Return the attributes for a style: colours and weight as classes, the rest unchanged, and no font."""
    names, rest = [], []
    for key, value in re.findall(r"([\w-]+): ([^;]+)", match[1]):
        if value in _CLASSES:
            names.append(f"{key}-{_CLASSES[value]}")
        elif key.startswith("font"):
            names += ["bold"] if "bold" in value or value.startswith("700") else []
        else:
            rest.append(f"{key}: {value}")
    return f'class="{" ".join(names)}" style="{"; ".join(rest)}"'
