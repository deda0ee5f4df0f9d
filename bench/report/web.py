"""A report as one HTML page: style and charts inside, nothing loaded, and a policy that forbids it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from bench.record import Record
from bench.report.block import Block, Chart, Figures, Section, Sentences, Table
from bench.report.content import heading, sections
from bench.report.plot import swatch
from bench.report.run import when
from bench.report.style import STYLE

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
# A cell of more letters than this is text and not a figure.
_LONG = 34


def page(records: Sequence[Record], labels: Sequence[str] | None = None) -> str:
    """Return the whole page.

    Args:
        records: what was measured; records of one kind are laid over each other.
        labels: what tells the records apart, one each; None where nothing needs to.

    Raises:
        BeelineError: when there is no record.
    """
    title = heading(records)
    times = sorted(when(record.started) for record in records)
    body = "\n".join(_section(section) for section in sections(records, labels))
    span = times[0] if times[0] == times[-1] else f"{times[0]} to {times[-1]}"
    return "\n".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>",
            f'<h1>{escape(title)}</h1>\n<p class="dim">Measured {escape(span)} (UTC).</p>',
            body,
            "</main>\n</body>\n</html>\n",
        )
    )


def _section(section: Section) -> str:
    blocks = "\n".join(map(_block, section.blocks))
    return f"<section>\n<h2>{escape(section.title)}</h2>\n{blocks}\n</section>"


def _block(block: Block) -> str:
    if isinstance(block, Figures):
        items = "".join(f"<li><b>{escape(value)}</b> {escape(name)}</li>" for value, name in block.items)
        return f'<ul class="figures">{items}</ul>'
    if isinstance(block, Sentences):
        lines = "".join(f"<p>{escape(line)}</p>" for line in block.lines)
        return f'<div class="{block.tone}">{lines}</div>'
    if isinstance(block, Chart):
        keys = "".join(f"<li>{swatch(key.series)} {escape(key.name)}</li>" for key in block.keys)
        legend = f'<ul class="keys">{keys}</ul>' if keys else ""
        return f"<figure>{legend}{block.svg}<figcaption>{escape(block.caption)}</figcaption></figure>"
    return _table(block)


def _table(table: Table) -> str:
    heads = "".join(_head(name) for name in table.heads)
    rows = "".join(_row(row, i in table.marked) for i, row in enumerate(table.rows))
    caption = escape(table.caption)
    style = ' class="words"' if table.words else ""
    # Who has no pointer scrolls it with the keyboard.
    inside = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table{style}>'
        f"<caption><span>{caption}</span></caption><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
    return f"<details><summary>{caption}</summary>{inside}</details>" if table.folded else inside


def _head(name: str) -> str:
    return f'<th scope="col">{escape(name)}</th>' if name else "<td></td>"


def _row(cells: Sequence[str], marked: bool) -> str:
    first, *rest = cells
    found = (
        f'<td class="long">{escape(cell)}</td>' if len(cell) > _LONG else f"<td>{escape(cell)}</td>" for cell in rest
    )
    style = ' class="marked"' if marked else ""
    return f'<tr{style}><th scope="row">{escape(first)}</th>{"".join(found)}</tr>'
