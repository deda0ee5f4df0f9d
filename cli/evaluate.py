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
    from train import references
    from train.data import labelled_pictures
    from train.evaluate import check_labels, compare, unseen
    from train.evaluate import evaluate as measure
    from train.export import lineage

    if report:
        check(report)
    if (data / references.FILE).is_file():
        if against or calibrate or report:
            words = "--against, --report and --calibrate compare labels"
            raise BeelineError(f"{words}, and {data} has captions in {references.FILE}; leave them out")
        with open_source(source, model) as opened_one:
            values, text = references.measure(source, opened_one.predict, data)
        return result(values, as_json, text)
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
    values = {"source": source, **reports[0].to_dict()}
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
