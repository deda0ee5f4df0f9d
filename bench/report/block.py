"""What a report is made of, before it is HTML or Markdown: sections of figures, sentences, tables, charts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figures:
    """A few large numbers, each with what it is."""

    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Sentences:
    """Text, a paragraph each; `tone` is `plain`, `lead` (the result), `good` or `bad`."""

    lines: tuple[str, ...]
    tone: str = "plain"


@dataclass(frozen=True)
class Table:
    """Rows of text under a caption; each row's first cell names it. `marked` are the rows that stand out.

    `folded` tables are long ones: closed on the page until somebody opens them. `words` are tables of text, which
    is read from the left; figures stand at the right.
    """

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: frozenset[int] = frozenset()
    folded: bool = False
    words: bool = False


@dataclass(frozen=True)
class Key:
    """One entry of a chart's legend: a series' number, or None for a reference, and its name."""

    series: int | None
    name: str


@dataclass(frozen=True)
class Chart:
    """A drawing as SVG, its caption, what is to be seen in it in words, and the legend of its series."""

    svg: str
    caption: str
    told: str
    keys: tuple[Key, ...] = ()


Block = Figures | Sentences | Table | Chart


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: tuple[Block, ...]
