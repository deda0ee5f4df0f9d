"""Reports: a page of sections as one HTML file that needs nothing else, or as Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from beeline.errors import BeelineError
from beeline.files import write_whole
from host.files import check_writable

# The CSS classes of the charts' colours, and the marks of four series in their legends.
NAMES = ("ink", "dim", "panel", "line", "grid", "bad", "s0", "s1", "s2", "s3", "s4", "s5")
GLYPHS = "●■◆▲"
_ROWS = 20  # of a table on a terminal


@dataclass(frozen=True)
class Figures:
    """A few large values, each with what it is."""

    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Sentences:
    """Text, a paragraph each; `tone` is `plain`, `lead` (the result), `good` or `bad`."""

    lines: tuple[str, ...]
    tone: str = "plain"


@dataclass(frozen=True)
class Table:
    """Rows of text under a caption; the first cell of a row is its name.

    `marked` rows stand out. A `folded` table is closed until a reader opens it. `words` align left, numbers right.
    `shades` colour the cells after the first, from -1 (red) to 1 (green).
    """

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: frozenset[int] = frozenset()
    folded: bool = False
    words: bool = False
    shades: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class Chart:
    """A function that draws the SVG, a caption, what the drawing shows in words, and a legend: series and names."""

    draw: Callable[[], str]
    caption: str
    description: str
    keys: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Pictures:
    """Thumbnails, each a `data:` address or the reason why there is none, the file's name, and a caption."""

    items: tuple[tuple[str, str, str], ...]


Block = Figures | Sentences | Table | Chart | Pictures


@dataclass(frozen=True)
class Section:
    """A heading and the blocks below it."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """A report: its title, a line of facts, its sections."""

    title: str
    facts: str
    sections: tuple[Section, ...]

    def html(self) -> str:
        """Return one HTML file, whose policy forbids it to load anything."""
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        options: Any = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": StrictUndefined}
        environment = Environment(loader=FileSystemLoader(Path(__file__).parent), **options)
        return environment.get_template("report.html.jinja").render(page=self, names=NAMES, glyphs=GLYPHS)

    def markdown(self) -> str:
        """Return the same as Markdown, with descriptions instead of charts."""
        parts = [f"# {_plain(self.title)}", _plain(self.facts)]
        for section in self.sections:
            parts += [f"## {_plain(section.title)}", *map(_block, section.blocks)]
        return "\n\n".join(filter(None, parts)) + "\n"


def terminal(blocks: Iterable[Block]) -> str:
    """Return the first rows of the tables among blocks as aligned lines; a star marks a row that stands out."""
    parts = []
    for block in blocks:
        if isinstance(block, Table):
            rows = [block.heads, *block.rows[:_ROWS]]
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            aligned = [str.ljust, *[str.ljust if block.words else str.rjust] * (len(widths) - 1)]
            lines = [f"{block.caption}:"]
            for i, row in enumerate(rows):
                cells = [align(cell, width) for align, cell, width in zip(aligned, row, widths, strict=True)]
                lines.append(f"{'*' if i - 1 in block.marked else ' '} {'  '.join(cells)}".rstrip())
            more = len(block.rows) - _ROWS
            parts.append("\n".join([*lines, *([f"  and {more} more"] if more > 0 else [])]))
    return "\n\n".join(parts)


def write(text: str, path: Path) -> Path:
    """Write a report whole, with missing folders, and return its path; raise BeelineError when that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise BeelineError(f"{path} cannot be written ({error.strerror}); name another file") from error
    return path


def check(path: Path) -> None:
    """Raise `BeelineError` if a report cannot be written to `path`, or what draws it is not installed."""
    check_writable(path.parent)
    if path.is_dir():
        raise BeelineError(f"{path} is a folder; name a file for the report, as {path / 'report.html'}")
    if missing := [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]:
        raise BeelineError(f"a report needs {' and '.join(missing)}; install it, or leave out the report")


def number(value: float) -> str:
    """Return three digits, without an exponent: `0.0123`, `1.23`, `12.3`, `123`, `1234`."""
    # 99.96 is `100` in three digits, and 0 is `0`.
    if not value or abs(value) >= 99.95:
        return f"{value:.0f}"
    return f"{value:#.3g}" if abs(value) >= 0.001 else f"{value:.4f}"


def _block(block: Block) -> str:
    if isinstance(block, Sentences):
        return "\n\n".join(f"**{_plain(line)}**" if block.tone == "lead" else _plain(line) for line in block.lines)
    if isinstance(block, Chart):
        return _plain(block.description)
    if not isinstance(block, Table):
        return "\n".join(f"- **{_plain(item[-2])}** {_plain(item[-1])}" for item in block.items)
    rules = ["---", *["---" if block.words else "---:"] * (len(block.heads) - 1)]
    lines = [[_plain(head) or " " for head in block.heads], rules]
    for i, row in enumerate(block.rows):
        lines.append([f"**{cell}**" if cell and i in block.marked else cell for cell in map(_plain, row)])
    return "\n".join([f"{_plain(block.caption)}:", "", *(f"| {' | '.join(line)} |" for line in lines)])


def _plain(text: str) -> str:
    """Return text in which Markdown finds no marks."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))
