"""`beeline data`: pictures that people said were answered wrongly, into a folder to train on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from beeline.errors import BeelineError
from cli.console import Json, result, say

if TYPE_CHECKING:
    from train.data import LabelledPictures

app = typer.Typer(help="Change a folder of labelled pictures.", no_args_is_help=True, add_completion=False)


@app.callback()
def _group() -> None:
    """Keep `add` a subcommand, though it is the only one."""


@app.command()
def add(
    feedback: Annotated[Path, typer.Argument(help="A folder of beeline_feedback, or any with one folder a label.")],
    dataset: Annotated[
        Path, typer.Argument(help="A folder with train/ and val/ or test/, one folder a label in each.")
    ],
    as_json: Json = False,
) -> None:
    """Copy the pictures into train/; what a half already holds, cannot be read or has a new label is left out."""
    from host.files import find_pictures, listed, sha256, write_whole
    from train.data import labelled_pictures
    from train.index import examine

    train, told = _train(dataset), labelled_pictures(feedback, say)
    facts = examine(told.root, [each.path for each in told.pictures], say)
    # Of all halves: a picture to measure on must not be trained on.
    known = {sha256(path): path for path in find_pictures([dataset])}
    counts, added, other = Counter[str](), Counter[str](), list[str]()
    for each in told.pictures:
        label, fact = told.labels[each.truth], facts[each.path]
        name = f"feedback-{fact.sha256[:16]}.{fact.kind.lower()}"
        if fact.fault:
            counts["damaged"] += 1
        elif label not in train.labels:
            counts["of a new label"] += 1
            other.append(f"{label!r} is a new label; make its folder in each half, with pictures of its own")
        elif before := known.get(fact.sha256):
            counts["already there"] += 1
            if label not in before.parts:
                other.append(f"{before} was told to be {label!r}; look at it, and move it if that is right")
        else:
            write_whole(train.root / label / name, each.path.read_bytes())
            known[fact.sha256] = train.root / label / name
            added[label] += 1
    for line in dict.fromkeys(other):
        say(f"data: {line}")
    left = listed([f"{count} {why}" for why, count in counts.items()]) or "none"
    text = f"{listed([f'{count} of {label}' for label, count in added.items()], 1000) or 'nothing'}; left out: {left}"
    values = {"added": added, "left_out": counts, "train": str(train.root)}
    result(values, as_json, f"added to {train.root}: {text}")


def _train(dataset: Path) -> LabelledPictures:
    """Return the training half of a folder; raise `BeelineError` where another split could hold out what is added."""
    from train.data import LEAVE_OUT, read

    data = None if dataset.is_file() else read(dataset, damaged=LEAVE_OUT)
    if data is None or data.train.root == data.val.root:
        why = "has no two halves, so an added picture could be held out"
        raise BeelineError(f"{dataset} {why}; name a folder with train/ and val/, one folder a label in each")
    return data.train
