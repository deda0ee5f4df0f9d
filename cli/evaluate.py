"""`beeline evaluate`: a run, an archive or a server on a folder of labelled pictures."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from beeline.errors import BeelineError
from cli.console import Json, result, say

if TYPE_CHECKING:
    from train.evaluate import Report
    from train.runs import Run

# By file the captions of pictures in a folder; how many are asked for at once.
_CAPTIONS, _BATCH = "captions.json", 16


def evaluate(
    source: Annotated[str, typer.Argument(help="A run's folder or id, latest, a .mar file or a URL.")],
    data: Annotated[Path, typer.Option(help="A folder with one folder of pictures a label, a CSV, or captions.json.")],
    model: Annotated[str | None, typer.Option(help="The model's name at the URL.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Another source: whether it is better by more than chance.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help='Fit a run\'s temperature and "not sure" score, and keep them in it.')
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Write a self-contained HTML report here.")] = None,
    as_json: Json = False,
) -> None:
    """Measure accuracy, calibration and the worst mistakes; pictures that fail count as wrong."""
    from cli.sources import open_source
    from host.report import check, write
    from train.data import labelled_pictures
    from train.evaluate import check_labels, compare, unseen
    from train.evaluate import evaluate as measure
    from train.export import lineage

    if report:
        check(report)
    if (data / _CAPTIONS).is_file():
        _captions(source, data, model, as_json)
        return
    pictures, notes, reports = labelled_pictures(data, say), [], []
    with ExitStack() as stack:
        names = [source, *([against] if against else [])]
        opened = [stack.enter_context(open_source(name, model, all_labels=calibrate)) for name in names]
        if calibrate and opened[0].run is None:
            raise BeelineError(f"only a run can be calibrated, and {source} is none; name the run it was built from")
        for each in filter(lambda each: each.labels, opened):
            check_labels(pictures, each.labels)
        # Both are asked for the same pictures.
        for name, each in zip(names, opened, strict=True):
            left = unseen(pictures, (each.run and each.run.seen) or frozenset())
            if count := len(pictures) - len(left):
                notes.append(f"{count} of {len(pictures)} pictures are left out, since {name} was trained on them.")
            elif each.run and each.run.seen is None:
                notes.append(f"{name} keeps no list of its training pictures, so none is left out.")
            pictures = left
            notes += [f"{name} was trained from {lineage(each.run)}."] if each.run else []
        reports = [measure(each.predict, pictures) for each in opened]
    values: dict[str, Any] = {"source": source, **reports[0].to_dict()}
    if against:
        words, p = compare(*reports)
        notes.append(f"{source} and {against}: {words}.")
        values["against"] = {"source": against, "p": p, **reports[1].to_dict()}
    if calibrate and opened[0].run:
        values["calibration"], words = _calibrate(opened[0].run, reports[0])
        notes.append(words)
    if report:
        write(reports[0].page(source, notes).html(), report)
        say(f"report: {report}")
    values["notes"] = notes
    result(values, as_json, "\n".join([reports[0].text(), *(["", *notes] if notes else [])]))


def _captions(source: str, data: Path, model: str | None, as_json: bool) -> None:
    """Compare captions with those of `captions.json`, by file a text or a list of texts; a failed one is wrong."""
    import json

    from cli.sources import open_source

    try:
        read = json.loads((data / _CAPTIONS).read_text(encoding="utf-8"))
        truth = {
            name: [texts] if isinstance(texts, str) else [str(each) for each in texts] for name, texts in read.items()
        }
        bodies = [(data / name).read_bytes() for name in truth]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        fix = 'it holds {"file": "its caption"}, or a list of captions, of files beside it'
        raise BeelineError(f"{data / _CAPTIONS} cannot be used ({error}); {fix}") from error
    with open_source(source, model) as opened:
        parts = [opened.predict(bodies[start : start + _BATCH]) for start in range(0, len(bodies), _BATCH)]
    answers = [answer.json() if answer.status == 200 else {} for part in parts for answer in part]
    if answers and not any("caption" in answer for answer in answers):
        raise BeelineError(f"{source} answered none of {len(answers)} pictures with a caption; name a captioning model")
    texts = [str(answer.get("caption", "")) for answer in answers]
    exact = sum(text in each for text, each in zip(texts, truth.values(), strict=True)) / max(1, len(texts))
    cider, note = _cider(texts, [*truth.values()])
    values = {"source": source, "pictures": len(texts), "exact": exact, "cider": cider, "notes": [note] if note else []}
    about = f", CIDEr {cider:.3f}" if cider is not None else f"; {note}"
    result(values, as_json, f"{exact:.4f} of {len(texts)} captions are exactly right{about}")


def _cider(texts: list[str], truth: list[list[str]]) -> tuple[float | None, str]:
    """Return CIDEr of captions, words apart by spaces; or None and why there is none."""
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError:
        return None, "no CIDEr, since pycocoevalcap is not installed: `uv pip install --no-deps pycocoevalcap`"
    expected, actual = dict(enumerate(truth)), {index: [text] for index, text in enumerate(texts)}
    return float(Cider().compute_score(expected, actual)[0]), ""


def _calibrate(run: Run, report: Report) -> tuple[dict[str, Any], str]:
    """Keep in the run and in its export the temperature and the score of guesses that these answers show."""
    from beeline.spec import FILE_NAME, ModelSpec
    from train.evaluate import temperature, warmed
    from train.model import guess_under
    from train.runs import finish

    spec = ModelSpec.load(run.export)
    before = spec.temperature or 1.0
    chosen = temperature(report, before)
    after = warmed(report, before / chosen)
    guess = guess_under((one.answers[0][1], one.within(1)) for one in after.judged if one.answers)
    # Neither the graph nor the golden pictures know of it, so the export stays as it is.
    replace(spec, temperature=chosen, not_sure_under=guess).save(run.export / FILE_NAME)
    finish(run.folder, {**run.record, "temperature": chosen, "not_sure_under": guess})
    values = {"temperature": chosen, "not_sure_under": guess, "calibration_error": after.calibration_error}
    moved = f"calibration error {report.calibration_error:.4f} before, {after.calibration_error:.4f} after"
    under = "no score is seen under which an answer is a guess" if guess is None else f"a guess under {guess:.2f}"
    return values, f"The run {run.id} has the temperature {chosen:g} now ({moved}); {under}. Build its archive again."
