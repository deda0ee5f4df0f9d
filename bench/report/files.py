"""Files of records in, files of reports out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from beeline.errors import BeelineError
from bench import record
from bench.record import Record
from bench.report.prose import markdown
from bench.report.web import page


def read(paths: Sequence[Path]) -> tuple[list[Record], list[str]]:
    """Return all records, and of each what tells it apart: its file, where there are several.

    Raises:
        BeelineError: for a file that is not there or holds no records.
    """
    stems = [path.stem for path in paths]
    often = Counter(stems)
    records: list[Record] = []
    labels: list[str] = []
    for path, stem in zip(paths, stems, strict=True):
        found = record.read(path)
        if not found:
            raise BeelineError(f"{path} holds no record; measure with `beeline bench ... --out {path.name}` first")
        records += found
        name = stem if often[stem] == 1 else f"{path.parent.name}/{stem}"
        labels += [name if len(paths) > 1 else ""] * len(found)
    return records, labels


def write(
    records: Sequence[Record], labels: Sequence[str], html: Path | None, text: Path | None
) -> tuple[list[Path], str]:
    """Write the page and the Markdown where they are wanted; return the files, and the Markdown.

    Raises:
        BeelineError: when a file cannot be written.
    """
    said = markdown(records, labels)
    wanted = [] if html is None else [(html, page(records, labels))]
    wanted += [] if text is None else [(text, said)]
    for path, content in wanted:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
        except OSError as error:
            raise BeelineError(f"{path} cannot be written ({error.strerror}); name another file") from error
    return [path for path, _ in wanted], said
