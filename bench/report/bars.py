"""Bars that lie, one below the other, each under its own words: room enough for names, on a phone too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from bench.report.axis import Axis
from bench.report.plot import SERIES, WIDTH, drawing

_LINE, _BAR, _FOOT = 26, 16, 18
_LEFT, _RIGHT = 4, 12
# Letters that a line holds at the size that phones get.
_ROOM = 52


@dataclass(frozen=True)
class Bar:
    """A name, a value with its words, an interval, and single measurements as dots."""

    name: str
    value: float | None
    text: str
    series: int = 0
    interval: tuple[float, float] | None = None
    dots: tuple[float, ...] = ()


def lying(title: str, told: str, bars: Sequence[Bar]) -> str:
    """Return the bars as SVG, all from 0 on one scale; one without a value is its words alone."""
    reached = [value for bar in bars for value in (bar.value or 0, *(bar.interval or ()), *bar.dots)]
    axis = Axis.linear("", [max([*reached, 0.0])])
    parts, top = [], 0
    for bar in bars:
        lines = 1 if len(bar.name) + len(bar.text) <= _ROOM else 2
        parts.append(_bar(bar, top, lines, axis))
        top += lines * _LINE + _BAR + _FOOT
    return drawing(title, told, "".join(parts), top)


def _bar(bar: Bar, top: float, lines: int, axis: Axis) -> str:
    def across(value: float) -> float:
        return _LEFT + axis.at(value) * (WIDTH - _LEFT - _RIGHT)

    y = top + lines * _LINE + 2
    words = (
        f'<text class="strong" x="{_LEFT}" y="{top + _LINE - 6}">{escape(bar.name)}</text>'
        f'<text x="{WIDTH - _RIGHT}" y="{y - 8}" text-anchor="end">{escape(bar.text)}</text>'
    )
    if bar.value is None:
        return f'{words}<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y + 8}" y2="{y + 8}"/>'
    width = max(1.0, across(bar.value) - _LEFT)
    parts = [
        words,
        f'<rect class="track" x="{_LEFT}" y="{y}" width="{WIDTH - _LEFT - _RIGHT}" height="{_BAR}" rx="3"/>',
        f'<rect class="bar s{bar.series % SERIES}" x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_BAR}" rx="3">'
        f"<title>{escape(f'{bar.name}: {bar.text}')}</title></rect>",
    ]
    if bar.interval is not None:
        low, high = map(across, bar.interval)
        middle = y + _BAR / 2
        parts.append(
            f'<path class="whisker" d="M{low:.1f},{middle}H{high:.1f}M{low:.1f},{y + 2}v{_BAR - 4}'
            f'M{high:.1f},{y + 2}v{_BAR - 4}"/>'
        )
    parts += [f'<circle class="dot" cx="{across(dot):.1f}" cy="{y + _BAR + 5}" r="2.5"/>' for dot in bar.dots]
    return "".join(parts)
