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

_BATCH = 32


def predict(
    pictures: Annotated[list[Path], typer.Argument(help="Picture files, or folders of them.")],
    url: Annotated[str | None, typer.Option(help="A running server: http://127.0.0.1:8080")] = None,
    mar: Annotated[Path | None, typer.Option(help="An archive, run without a server. [the store's only one]")] = None,
    model: Annotated[str | None, typer.Option(help="The model's name at the URL.")] = None,
    as_json: Json = False,
) -> None:
    """Classify pictures with a running server or with an archive; exit 1 if any picture got no answer."""
    from cli.sources import default_archive, open_source

    if url and mar:
        raise BeelineError(f"both --url {url} and --mar {mar} are given; name one of them")
    paths = find_pictures(pictures)
    source = url or str(mar or default_archive())
    rows: list[dict[str, Any]] = []
    with open_source(source, model) as ask:
        for start in range(0, len(paths), _BATCH):
            chunk = paths[start : start + _BATCH]
            answers = ask([path.read_bytes() for path in chunk])
            rows += [_row(path, answer, source) for path, answer in zip(chunk, answers, strict=True)]
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
        if not isinstance(body, dict) or not all(isinstance(score, (int, float)) for score in body.values()):
            raise Undetermined(
                f"{source} answers {path} with {text!r}, which is no prediction; name the address of a Beeline server"
            )
        return {**row, "predictions": body}
    # A proxy on the way may answer with HTML.
    if not isinstance(body, dict):
        body = {"code": answer.status, "type": "NoJson", "message": f"the answer is no JSON object: {text!r}"}
    return {**row, "error": body}


def _table(rows: list[dict[str, Any]]) -> str:
    width = max(len(row["picture"]) for row in rows)
    lines = []
    for row in rows:
        text = "  ".join(f"{label} {score:.3f}" for label, score in row.get("predictions", {}).items())
        if (error := row.get("error")) is not None:
            text = f"{row['status']} {error.get('type', 'Error')}: {error.get('message', error)}"
        lines.append(f"{row['picture']:<{width}}  {text}")
    return "\n".join(lines)
