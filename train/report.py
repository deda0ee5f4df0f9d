"""An evaluation as a page: figures, labels, confusion, the surest mistakes as thumbnails."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from beeline import pixels
from beeline.errors import RequestError
from host.report import Figures, Page, Pictures, Section, Sentences, Table, write
from host.report.charts import Bar, bars
from train.evaluate import Judged, Report

_THUMBNAIL = 180
_MISTAKES = 24
_FAILURES = 100
# A larger matrix is unreadable as a table; its largest cells are listed.
_MATRIX = 30
_PAIRS = 40
_LOWEST = 12


def write_report(report: Report, path: Path, source: str) -> Path:
    """Write the page for `report` to `path` and return it; `source` says what answered."""
    return write(page(report, source).html(), path)


def page(report: Report, source: str) -> Page:
    """Return the page of an evaluation."""
    scores, failures, mistakes = report.scores(), report.failures(), report.mistakes()
    failed = str(sum(map(len, failures.values())))
    figures = [(f"{report.top1:.1%}", "accuracy"), (f"{report.topk:.1%}", f"true label among the best {report.k}")]
    figures += [(str(report.pictures), "pictures"), (failed, "without a prediction, counted as wrong")]
    lowest = sorted(scores, key=lambda one: one.f1)[:_LOWEST]
    drawn = [Bar(one.label, one.f1, f"{one.f1:.3f}") for one in lowest]
    chart = bars("F1", "F1 of the labels, lowest first.", drawn, 1.0)
    rows = (
        (one.label, str(one.pictures), *(f"{x:.3f}" for x in (one.precision, one.recall, one.f1))) for one in scores
    )
    table = Table("Every label", ("label", "pictures", "precision", "recall", "F1"), tuple(rows))
    shown = f"the surest {_MISTAKES} of {len(mistakes)}" if len(mistakes) > _MISTAKES else f"all {len(mistakes)}"
    wrong = Pictures(tuple(map(_thumbnail, mistakes[:_MISTAKES]))) if mistakes else Sentences(("None.",))
    sections = [
        Section("Labels", (Figures(tuple(figures)), chart, table)),
        Section("Confusion", (_confusion(report),)),
        Section(f"Mistakes, {shown}" if mistakes else "Mistakes", (wrong,)),
    ]
    for status, ones in failures.items():
        lines = tuple(f"{one.path}: {one.message}" for one in ones[:_FAILURES])
        sections.append(Section(f"Without a prediction, status {status}: {len(ones)}", (Sentences(lines),)))
    return Page(f"{report.right} of {report.pictures} right", f"{source} on {report.data}", tuple(sections))


def _confusion(report: Report) -> Table:
    counts = dict(zip(report.labels, report.confusion(), strict=True))
    if len(counts) <= _MATRIX:
        rows = tuple((label, *map(str, row)) for label, row in counts.items())
        shades = tuple(
            tuple(
                (1 if name == label else -1) * n / max(1, sum(row)) for name, n in zip(report.columns, row, strict=True)
            )
            for label, row in counts.items()
        )
        heads = ("true label \\ answer", *report.columns)
        return Table("Pictures of each true label by answer", heads, rows, shades=shades)
    cells = [(n, label, name) for label, row in counts.items() for name, n in zip(report.columns, row, strict=True)]
    pairs = sorted((cell for cell in cells if cell[0] and cell[1] != cell[2]), reverse=True)[:_PAIRS]
    rows = tuple((label, name, str(n)) for n, label, name in pairs)
    return Table("Most confused", ("true label", "answer", "pictures"), rows, words=True)


def _thumbnail(one: Judged) -> tuple[str, str, str]:
    caption = f"answered {one.answers[0][0]} ({one.answers[0][1]:.3f}), truly {one.truth}"
    try:
        picture = pixels.open_rgb(one.path.read_bytes())
    except (RequestError, OSError) as error:
        return str(error), one.path.name, caption
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}", one.path.name, caption
