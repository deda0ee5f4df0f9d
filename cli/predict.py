"""`beeline predict`: pictures in, a table or JSON out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from beeline.errors import BeelineError, Undetermined
from cli.console import Json, fail, result, say
from host.files import find_pictures

if TYPE_CHECKING:
    from beeline.answer import Answer

_BATCH, _ON_GRID, _COLUMNS = 32, 100, 5


def predict(
    pictures: Annotated[list[Path], typer.Argument(help="Picture files, or folders of them.")],
    url: Annotated[str | None, typer.Option(help="A running server: http://127.0.0.1:8080")] = None,
    mar: Annotated[Path | None, typer.Option(help="An archive, run without a server. [the store's only one]")] = None,
    run: Annotated[str | None, typer.Option(help="A run's folder or id, or latest.")] = None,
    grid: Annotated[Path | None, typer.Option(help="Draw the pictures with their answers into this PNG.")] = None,
    model: Annotated[str | None, typer.Option(help="The model's name at the URL.")] = None,
    as_json: Json = False,
) -> None:
    """Classify or caption pictures with a server, an archive or a run; exit 1 if any picture got no answer."""
    from cli.sources import default_archive, open_source
    from host import report
    from train.evaluate import answers

    given = {f"--{name} {value}": value for name, value in (("url", url), ("mar", mar), ("run", run)) if value}
    if len(given) > 1:
        raise BeelineError(f"both {' and '.join(given)} are given; name one of them")
    if grid:
        report.check(grid)
    paths = find_pictures(pictures, say)
    source = str(next(iter(given.values()), None) or default_archive())
    rows: list[dict[str, Any]] = []
    with open_source(source, model) as opened:
        for start in range(0, len(paths), _BATCH):
            chunk = paths[start : start + _BATCH]
            made = answers(opened.predict, chunk)
            rows += [_row(path, answer, source) for path, answer in zip(chunk, made, strict=True)]
    if grid:
        say(f"grid: {_grid(rows[:_ON_GRID], grid)}" + (f", the first {_ON_GRID}" if len(rows) > _ON_GRID else ""))
    failed = sum(row["status"] != 200 for row in rows)
    result({"source": source, "pictures": rows, "failed": failed}, as_json, _table(rows))
    if failed:
        say(f"{failed} of {len(rows)} pictures got no prediction")
        fail()


def _row(path: Path, answer: Answer, source: str) -> dict[str, Any]:
    """Return one picture's row of the result; raise Undetermined for a 200 that is no prediction."""
    row = {"picture": str(path), "status": answer.status}
    try:
        body = answer.json()
    except ValueError:
        body = None
    text = " ".join(answer.body.split())[:120]
    if answer.status == 200:
        if isinstance(body, dict) and isinstance(body.get("caption"), str):
            body = {body["caption"]: body.get("score")}
        if not isinstance(body, dict) or not all(isinstance(score, (int, float)) for score in body.values()):
            raise Undetermined(
                f"{source} answers {path} with {text!r}, which is no prediction; name the address of a Beeline server"
            )
        return {**row, "predictions": body}
    # A proxy on the way may answer with HTML.
    if not isinstance(body, dict):
        body = {"code": answer.status, "type": "NoJson", "message": f"the answer is no JSON object: {text!r}"}
    return {**row, "error": body}


def _grid(rows: list[dict[str, Any]], path: Path) -> Path:
    """Draw pictures with their best labels below, red without an answer; return the path of the PNG."""
    from matplotlib.figure import Figure

    from beeline import pixels
    from beeline.errors import RequestError

    high = -(-len(rows) // _COLUMNS)
    figure = Figure(figsize=(2.4 * _COLUMNS, 2.8 * high), dpi=80, layout="constrained")
    for axes, row in zip(figure.subplots(high, _COLUMNS, squeeze=False).flat, rows + [{}] * _COLUMNS, strict=False):
        axes.axis("off")
        if not row:
            continue
        try:
            picture = pixels.open_rgb(Path(row["picture"]).read_bytes(), least=200)
            picture.thumbnail((200, 200))
            axes.imshow(picture)
        except (RequestError, OSError):
            axes.text(0.5, 0.5, "no preview", ha="center")
        best = [f"{label} {score:.2f}" for label, score in [*row.get("predictions", {}).items()][:2]]
        words = "\n".join([Path(row["picture"]).name[:28], *(best or [f"no answer: {row['status']}"])])
        axes.set_title(words, size=8, color="black" if best else "#b3261e", parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def _table(rows: list[dict[str, Any]]) -> str:
    width = max(len(row["picture"]) for row in rows)
    lines = []
    for row in rows:
        text = "  ".join(f"{label} {score:.3f}" for label, score in row.get("predictions", {}).items())
        if (error := row.get("error")) is not None:
            text = f"{row['status']} {error.get('type', 'Error')}: {error.get('message', error)}"
        lines.append(f"{row['picture']:<{width}}  {text}")
    return "\n".join(lines)
