"""An evaluation as one HTML file that needs nothing else: inline style, bars and thumbnails."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape
from pathlib import Path

from beeline import pixels
from beeline.errors import RequestError
from train.evaluate import Judged, LabelScore, Report

_THUMBNAIL = 180
_MISTAKES = 24
_FAILURES = 100
# A larger matrix cannot be read as a table; its largest cells are listed instead.
_MATRIX = 30
_PAIRS = 40

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --dim: #5c6370; --ground: #fff; --panel: #f4f5f7;
  --line: #d9dce1; --right: 20, 120, 80; --wrong: 190, 50, 40; --bar: #3567c9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --dim: #9aa3af; --ground: #15171a;
  --panel: #1f2227; --line: #353a42; --right: 70, 190, 130; --wrong: 240, 110, 95; --bar: #7ea6ff; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground);
  max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
.dim, figcaption small { color: var(--dim); overflow-wrap: anywhere; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; padding: 0; list-style: none; }
.figures li { background: var(--panel); border-radius: 8px; padding: .7rem 1.2rem; }
.figures b { display: block; font-size: 1.6rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: .3rem .7rem; text-align: right; }
th[scope=row] { text-align: left; } svg rect { fill: var(--bar); }
.mistakes { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--panel); border-radius: 8px; overflow: hidden; }
figure img { width: 100%; height: 150px; object-fit: contain; display: block; }
figcaption { padding: .5rem .7rem; } figcaption small { display: block; }
"""


def write_report(report: Report, path: Path, source: str) -> Path:
    """Write the page for `report` to `path` and return it; `source` says what answered."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(report, source), encoding="utf-8")
    return path


def page(report: Report, source: str) -> str:
    """Return the whole page; it loads nothing, and its policy forbids it to."""
    title = f"{report.right} of {report.pictures} right"
    return "\n".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>",
            f"<h1>{escape(title)}</h1>",
            f'<p class="dim">{escape(source)} on {escape(report.data)}</p>',
            _figures(report),
            _scores(report.scores()),
            _confusion(report),
            _mistakes(report.mistakes()),
            _failures(report.failures()),
            "</main>\n</body>\n</html>\n",
        )
    )


def _figures(report: Report) -> str:
    failed = sum(len(ones) for ones in report.failures().values())
    figures = [
        (f"{report.top1:.1%}", "accuracy"),
        (f"{report.topk:.1%}", f"true label among the best {report.k}"),
        (str(report.pictures), "pictures"),
        (str(failed), "without a prediction, counted as wrong"),
    ]
    items = "".join(f"<li><b>{escape(value)}</b> {escape(name)}</li>" for value, name in figures)
    return f'<ul class="figures">{items}</ul>'


def _scores(scores: list[LabelScore]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(one.label)}</th><td>{one.pictures}</td><td>{one.precision:.3f}</td>'
        f"<td>{one.recall:.3f}</td><td>{one.f1:.3f}</td><td>{_bar(one.f1)}</td></tr>"
        for one in scores
    )
    heads = _heads("label", "pictures", "precision", "recall", "F1", "")
    return f'<h2>Labels</h2><div class="scroll"><table>{heads}<tbody>{rows}</tbody></table></div>'


def _bar(share: float) -> str:
    width = f"{120 * share:.1f}"
    return f'<svg width="120" height="12" role="img" aria-label="{share:.1%}"><rect width="{width}" height="12"/></svg>'


def _confusion(report: Report) -> str:
    if len(report.labels) > _MATRIX:
        return _pairs(report)
    rows = []
    for label, counts in zip(report.labels, report.confusion(), strict=True):
        cells = "".join(
            f'<td style="background: rgba(var(--{"right" if name == label else "wrong"}), '
            f'{0.65 * count / max(1, sum(counts)):.2f})">{count}</td>'
            for name, count in zip(report.columns, counts, strict=True)
        )
        rows.append(f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>')
    heads = _heads("true label \\ answer", *report.columns)
    return f'<h2>Confusion</h2><div class="scroll"><table>{heads}<tbody>{"".join(rows)}</tbody></table></div>'


def _pairs(report: Report) -> str:
    pairs = [
        (count, label, name)
        for label, counts in zip(report.labels, report.confusion(), strict=True)
        for name, count in zip(report.columns, counts, strict=True)
        if count and name != label
    ]
    rows = "".join(
        f'<tr><th scope="row">{escape(label)}</th><th scope="row">{escape(name)}</th><td>{count}</td></tr>'
        for count, label, name in sorted(pairs, reverse=True)[:_PAIRS]
    )
    heads = _heads("true label", "answer", "pictures")
    return f"<h2>Most confused</h2><table>{heads}<tbody>{rows}</tbody></table>"


def _heads(*names: str) -> str:
    return "<thead><tr>" + "".join(f'<th scope="col">{escape(name)}</th>' for name in names) + "</tr></thead>"


def _mistakes(mistakes: list[Judged]) -> str:
    if not mistakes:
        return "<h2>Mistakes</h2><p>None.</p>"
    figures = "".join(
        f"<figure>{_thumbnail(one.path)}<figcaption>answered <b>{escape(one.answers[0][0])}</b> "
        f"({one.answers[0][1]:.3f}), truly <b>{escape(one.truth)}</b>"
        f"<small>{escape(one.path.name)}</small></figcaption></figure>"
        for one in mistakes[:_MISTAKES]
    )
    more = f"the surest {_MISTAKES} of {len(mistakes)}" if len(mistakes) > _MISTAKES else f"all {len(mistakes)}"
    return f'<h2>Mistakes, {more}</h2><div class="mistakes">{figures}</div>'


def _thumbnail(path: Path) -> str:
    try:
        picture = pixels.open_rgb(path.read_bytes())
    except (RequestError, OSError) as error:
        return f"<p>{escape(str(error))}</p>"
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    target = io.BytesIO()
    picture.save(target, "JPEG", quality=80)
    text = base64.b64encode(target.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{text}" alt="{escape(path.name, quote=True)}">'


def _failures(failures: dict[int, list[Judged]]) -> str:
    if not failures:
        return ""
    return "<h2>Without a prediction</h2>" + "".join(
        f"<h3>Status {status}: {len(ones)}</h3><ul>{_items(ones[:_FAILURES])}</ul>" for status, ones in failures.items()
    )


def _items(ones: Iterable[Judged]) -> str:
    return "".join(f"<li>{escape(str(one.path))}: {escape(one.message)}</li>" for one in ones)
