"""`beeline predict`: pictures in, a table or JSON out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from beeline.errors import BeelineError, Undetermined
from cli.console import fail, result, say

if TYPE_CHECKING:
    from beeline.answer import Answer

PICTURES = {".jpg", ".jpeg", ".png", ".gif", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".mpo"}
_BATCH = 32
_SHOWN = 120


def predict(
    pictures: Annotated[list[Path], typer.Argument(help="Picture files, or folders of them.")],
    url: Annotated[str | None, typer.Option(help="A running server: http://127.0.0.1:8080")] = None,
    mar: Annotated[Path | None, typer.Option(help="An archive, run without a server. [the store's only one]")] = None,
    model: Annotated[str | None, typer.Option(help="The model's name at the URL.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on the last line.")] = False,
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


def find_pictures(given: list[Path]) -> list[Path]:
    """Return every file given, and the pictures in every folder given, sorted.

    Raises:
        BeelineError: for a path that is not there, or when no picture is found.
    """
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in PICTURES)
        elif path.is_file():
            found.append(path)
        else:
            raise BeelineError(f"{path} is not there; name a picture or a folder of pictures")
    if not found:
        raise BeelineError(
            f"no picture in {', '.join(map(str, given))}; known endings are {', '.join(sorted(PICTURES))}"
        )
    return found


def _row(path: Path, answer: Answer, source: str) -> dict[str, Any]:
    """Return one picture's line of the result.

    Raises:
        Undetermined: for a 200 that is no prediction. An error's body may be anything: a proxy on the way
            writes HTML.
    """
    row = {"picture": str(path), "status": answer.status}
    try:
        body = answer.json()
    except ValueError:
        body = None
    text = " ".join(answer.body.split())[:_SHOWN]
    if answer.status == 200:
        if not isinstance(body, dict) or not all(isinstance(score, (int, float)) for score in body.values()):
            raise Undetermined(
                f"{source} answers {path} with {text!r}, which is no prediction; name the address of a Beeline server"
            )
        return {**row, "predictions": body}
    if not isinstance(body, dict):
        body = {"code": answer.status, "type": "NoJson", "message": f"the answer is no JSON object: {text!r}"}
    return {**row, "error": body}


def _table(rows: list[dict[str, Any]]) -> str:
    width = max(len(row["picture"]) for row in rows)
    return "\n".join(f"{row['picture']:<{width}}  {_cell(row)}" for row in rows)


def _cell(row: dict[str, Any]) -> str:
    if row["status"] != 200:
        error = row["error"]
        return f"{row['status']} {error.get('type', 'Error')}: {error.get('message', error)}"
    return "  ".join(f"{label} {score:.3f}" for label, score in row["predictions"].items())
