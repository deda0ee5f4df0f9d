"""A chart with two axes as SVG: lines, markers, bars and limits, each with its words for who cannot see it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from bench.ladder.text import number
from bench.report.axis import Axis

WIDTH, HEIGHT = 640, 380
# Wide enough on the left for four figures at the size that phones get.
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 18, 34, 58
SERIES = 6
# The width of a letter at the size that phones get.
_LETTER = 11.5


class Plot:
    """Draw into it, then ask for `svg`. Colours come from the page's style, by the classes `s0` ... and `ref`."""

    def __init__(self, title: str, told: str, x: Axis, y: Axis) -> None:
        """Begin with the axes.

        Args:
            title: what is shown.
            told: what is to be seen in it, in words.
            x: across.
            y: up.
        """
        self.title, self.told = title, told
        self.x, self.y = x, y
        self._parts = [self._frame()]
        self._rings: list[tuple[float, float, float]] = []

    def line(self, points: Sequence[tuple[float, float]], series: int | None, style: str = "") -> None:
        """Join points; `series` None is a reference, `style` is nothing, `dashed` or `dotted`."""
        places = " ".join(f"{self._across(x):.1f},{self._up(y):.1f}" for x, y in points)
        style = style or ("dashed" if series is None else "")
        self._parts.append(f'<polyline class="line {_colour(series)} {style}" points="{places}"/>')

    def marker(self, point: tuple[float, float], series: int | None, tip: str, style: str = "") -> None:
        """Mark a point; each series has a shape of its own, and `tip` shows under a pointer."""
        shape = _shape(self._across(point[0]), self._up(point[1]), series)
        self._parts.append(f'<g class="marker {_colour(series)} {style}"><title>{escape(tip)}</title>{shape}</g>')

    def ring(self, point: tuple[float, float], text: str) -> None:
        """Put a ring and a word around a chosen point; the word stands above, or below where that is taken."""
        x, y = self._across(point[0]), self._up(point[1])
        half = _LETTER * len(text) / 2
        middle = min(max(x, _LEFT + half), WIDTH - _RIGHT - half)
        taken = any(abs(middle - at) < half + other and abs(y - up) < 44 for at, up, other in self._rings)
        self._rings.append((middle, y, half))
        below = taken or y < _TOP + 24
        self._parts.append(
            f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="9"/>'
            f'<text class="strong halo" x="{middle:.1f}" y="{y + (29 if below else -15):.1f}" '
            f'text-anchor="middle">{escape(text)}</text>'
        )

    def cross(self, x: float, text: str) -> None:
        """Mark a place on the horizontal axis at which there is no value."""
        place = self._across(x)
        inward = place > WIDTH - 170
        anchor, shift = ("end", -9) if inward else ("start", 9)
        y = _TOP + 16
        self._parts.append(
            f'<path class="cross" d="M{place - 5:.1f},{y - 5}l10,10m0,-10l-10,10"/>'
            f'<text class="halo" x="{place + shift:.1f}" y="{y + 5}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def vertical(self, x: float, text: str, style: str = "limit", row: int = 0) -> None:
        """Draw a line up at `x`, with a word at its foot, or `row` lines above it."""
        place = self._across(x)
        inward = place > WIDTH / 2
        anchor, shift = ("end", -6) if inward else ("start", 6)
        self._parts.append(
            f'<line class="{style}" x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>'
            f'<text class="halo {style}-text" x="{place + shift:.1f}" y="{HEIGHT - _BOTTOM - 9 - 22 * row}" '
            f'text-anchor="{anchor}">{escape(text)}</text>'
        )

    def horizontal(self, y: float, text: str) -> None:
        """Draw a limit across at `y`, with a word."""
        place = self._up(y)
        self._parts.append(
            f'<line class="limit" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>'
            f'<text class="halo limit-text" x="{WIDTH - _RIGHT - 6}" y="{place - 7:.1f}" text-anchor="end">'
            f"{escape(text)}</text>"
        )

    def column(self, left: float, right: float, value: float, series: int, tip: str) -> None:
        """Draw an upright bar between two shares of the width, from the axis up to `value`."""
        across = WIDTH - _LEFT - _RIGHT
        top = self._up(value)
        self._parts.append(
            f'<rect class="bar {_colour(series)}" x="{_LEFT + left * across:.1f}" y="{top:.1f}" '
            f'width="{max(1.0, (right - left) * across):.1f}" height="{HEIGHT - _BOTTOM - top:.1f}">'
            f"<title>{escape(tip)}</title></rect>"
        )

    def names(self, names: Sequence[str]) -> None:
        """Write names below equal parts of the width, in place of ticks; too many for the width lose some."""
        every = 1 + len(names) // 12
        part = (WIDTH - _LEFT - _RIGHT) / max(1, len(names))
        for index in range(0, len(names), every):
            x = _LEFT + (index + 0.5) * part
            self._parts.append(
                f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 20}" text-anchor="middle">{escape(names[index])}</text>'
            )

    def svg(self) -> str:
        """Return the drawing."""
        return drawing(self.title, self.told, "".join(self._parts), HEIGHT)

    def _across(self, value: float) -> float:
        return _LEFT + self.x.at(value) * (WIDTH - _LEFT - _RIGHT)

    def _up(self, value: float) -> float:
        return HEIGHT - _BOTTOM - self.y.at(value) * (HEIGHT - _TOP - _BOTTOM)

    def _frame(self) -> str:
        parts = [
            f'<text class="axis" x="4" y="16">{escape(self.y.title)}</text>',
            f'<text class="axis" x="{WIDTH - _RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{escape(self.x.title)}</text>',
        ]
        for tick in self.y.ticks:
            y = self._up(tick)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{_LEFT - 8}" y="{y + 4.5:.1f}" text-anchor="end">{_tick(tick)}</text>')
        for tick in self.x.ticks:
            x = self._across(tick)
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 20}" text-anchor="middle">{_tick(tick)}</text>')
        foot = HEIGHT - _BOTTOM
        parts.append(f'<line class="frame" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{foot}" y2="{foot}"/>')
        return "".join(parts)


def drawing(title: str, told: str, content: str, height: float) -> str:
    """Return an SVG element whose title and description are read to who cannot see it."""
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img">'
        f"<title>{escape(title)}</title><desc>{escape(told)}</desc>{content}</svg>"
    )


def swatch(series: int | None) -> str:
    """Return a legend's small sample of a series' line and marker."""
    dashed = " dashed" if series is None else ""
    return (
        f'<svg class="swatch" viewBox="0 0 28 14" aria-hidden="true"><path class="line {_colour(series)}{dashed}" '
        f'd="M0,7h28"/><g class="marker {_colour(series)}">{_shape(14, 7, series)}</g></svg>'
    )


def _colour(series: int | None) -> str:
    return "ref" if series is None else f"s{series % SERIES}"


def _shape(x: float, y: float, series: int | None) -> str:
    """Return a marker: colour is not all that tells the series apart."""
    kind = 4 if series is None else series % 4
    if kind == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    if kind == 1:
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
    if kind == 2:
        return f'<path d="M{x:.1f},{y - 5.5:.1f}l5.5,5.5l-5.5,5.5l-5.5,-5.5z"/>'
    if kind == 3:
        return f'<path d="M{x:.1f},{y - 5:.1f}l5.5,9.5h-11z"/>'
    return f'<path d="M{x:.1f},{y + 5:.1f}l5,-9h-10z"/>'


def _tick(value: float) -> str:
    return f"{value:g}" if value < 1e5 else number(value)
