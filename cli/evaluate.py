"""`beeline evaluate`: a run, an archive or a server on a folder of labelled pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.console import Json, result, say


def evaluate(
    source: Annotated[str, typer.Argument(help="A run's folder, a .mar file or a URL.")],
    data: Annotated[Path, typer.Option(help="A folder with one folder of pictures a label.")],
    model: Annotated[str | None, typer.Option(help="The model's name at the URL.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a self-contained HTML report here.")] = None,
    as_json: Json = False,
) -> None:
    """Measure accuracy: metrics, confusion matrix, worst mistakes; pictures that fail count as wrong."""
    from cli.sources import open_source
    from host.report import write
    from train.data import labelled_pictures
    from train.evaluate import evaluate as measure

    pictures = labelled_pictures(data)
    with open_source(source, model) as predict:
        measured = measure(predict, pictures)
    if report:
        write(measured.page(source).html(), report)
        say(f"report: {report}")
    result({"source": source, **measured.to_dict()}, as_json, measured.text())
