"""A report as Markdown: the same sections; a chart is told in its words."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bench.record import Record
from bench.report.block import Block, Chart, Figures, Section, Sentences, Table
from bench.report.content import heading, sections

_SPECIAL = re.compile(r"([\\`*_\[\]<>|#])")


def markdown(records: Sequence[Record], labels: Sequence[str] | None = None) -> str:
    """Return the report; arguments and errors as for `page`."""
    parts = [f"# {_plain(heading(records))}", *(_section(section) for section in sections(records, labels))]
    return "\n\n".join(parts) + "\n"


def _section(section: Section) -> str:
    return "\n\n".join([f"## {_plain(section.title)}", *filter(None, map(_block, section.blocks))])


def _block(block: Block) -> str:
    if isinstance(block, Figures):
        return "\n".join(f"- **{_plain(value)}** {_plain(name)}" for value, name in block.items)
    if isinstance(block, Sentences):
        return "\n\n".join(f"**{_plain(line)}**" if block.tone == "lead" else _plain(line) for line in block.lines)
    if isinstance(block, Chart):
        return _plain(block.told)
    return _table(block)


def _table(table: Table) -> str:
    heads = "| " + " | ".join(_plain(head) or " " for head in table.heads) + " |"
    side = " --- " if table.words else " ---: "
    rule = "|" + "|".join([" --- ", *[side] * (len(table.heads) - 1)]) + "|"
    rows = [
        "| " + " | ".join(_cell(cell, i in table.marked) for cell in row) + " |" for i, row in enumerate(table.rows)
    ]
    return "\n".join([f"{_plain(table.caption)}:", "", heads, rule, *rows])


def _cell(text: str, marked: bool) -> str:
    cell = _plain(text)
    return f"**{cell}**" if marked and cell else cell


def _plain(text: str) -> str:
    """Return text that Markdown takes as it is."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
