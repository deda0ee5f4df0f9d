"""`beeline search`: the settings, or the network for a budget of milliseconds, that judge best."""

from __future__ import annotations

import math
import os
import shlex
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from beeline.errors import BeelineError
from cli.console import Json, fail, result, say
from host import ROOT

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from train.data import DataSet
    from train.evaluate import Report
    from train.plan import Plan
    from train.runs import Run
    from train.search import Search

# Pictures of a timed batch, the repeats of which the median counts, and their seconds at most.
_BATCH, _REPEATS, _SECONDS = 8, 7, 20.0


def search(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="What to search, as fit.batch=choice(8,32); key=value for all trials.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="As of `train`. [BEELINE_DATA]")] = None,
    weights: Annotated[
        list[str] | None, typer.Option(help="Weights to start from; NAME=FILE for one architecture. [BEELINE_WEIGHTS]")
    ] = None,
    objective: Annotated[str, typer.Option(help="accuracy; or accuracy,milliseconds of a forward pass.")] = "accuracy",
    trials: Annotated[int, typer.Option(min=1, help="Trials of all processes together.")] = 20,
    folds: Annotated[int, typer.Option(min=1, max=5, help="Fifths of the training pictures that judge a trial.")] = 1,
    max_ms: Annotated[
        float | None, typer.Option(min=1e-6, help="Pick the most accurate within these milliseconds.")
    ] = None,
    min_accuracy: Annotated[
        float | None, typer.Option(min=0, max=1, help="Pick the fastest of at least this accuracy.")
    ] = None,
    study: Annotated[str, typer.Option(help="Its name; the same command joins it, or goes on with it.")] = "search",
    storage: Annotated[
        str | None, typer.Option(help="A database instead of a journal, as postgresql+psycopg://HOST/NAME.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where runs and studies are kept.", show_default="runs/")] = ROOT / "runs",
    as_json: Json = False,
) -> None:
    """Try settings of `train` on parts of the training pictures, and train the best on all of them."""
    from importlib.util import find_spec

    if find_spec("optuna") is None:
        raise BeelineError("a search needs Optuna, which is not installed; run `make setup`")
    if objective not in ("accuracy", "accuracy,milliseconds"):
        raise BeelineError(f"--objective is {objective!r}; allowed: accuracy or accuracy,milliseconds")
    is_timed, is_limited = objective != "accuracy", (max_ms, min_accuracy) != (None, None)
    if not is_timed and is_limited:
        raise BeelineError("--max-ms and --min-accuracy pick by time too; add --objective accuracy,milliseconds")
    from host.files import check_writable
    from host.report import check, write
    from train.config import quoted
    from train.plan import VARIABLE, plan
    from train.search import open_search, page, pick, reason
    from train.space import SERVING, read_space

    check_writable(runs)
    check(runs / "studies" / study / "report.html")
    space = read_space(
        overrides or [], objective.rpartition(",")[2], weights or list(filter(None, [os.environ.get(VARIABLE)]))
    )
    found = plan([*space.words({}), *([f"data.folder={quoted(data)}"] if data else [])], say)
    # Without weights to start from, the default is another recipe.
    space, measure = replace(space, recipe=found.config.fit.recipe), measured if is_timed else None
    open_study = open_search(study, storage, space, found.data, folds, trials, runs, say, measure)
    open_study.work()
    done, running = open_study.done, open_study.running
    chosen = None if is_timed and not is_limited else pick(done, max_ms, min_accuracy)
    report = write(page(open_study, done, chosen).html(), open_study.folder / "report.html")
    if not running and done and all(map(reason, done)):
        raise BeelineError(f"no trial of {len(done)} succeeded, see {report}; the first failed: {reason(done[0])}")
    values: dict[str, Any] = {"study": study, "trials": len(done), "running": running, "report": str(report)}
    text, is_within = f"{len(done)} trials, their runs in {open_study.folder / 'runs'}; {report}", not is_limited
    if running:
        text += f"; {running} are still tried by other processes, the last of which trains the best"
    elif chosen is None and is_limited:
        text += "; no trial is within --max-ms and --min-accuracy"
    elif chosen is not None:
        values |= _final(open_study, chosen, found)
        is_within = values["accuracy"] >= (min_accuracy or 0) and (values["milliseconds"] or 0) <= (max_ms or math.inf)
        text += f"\n{values['sentence']}\n" + ("" if is_within else "trained on all pictures it is beyond the limits\n")
        options = {key: chosen.params[key] for key in SERVING if key in chosen.params}
        if seen := _pictures(found.data, options, open_study.folder / "pictures"):
            options["pictures"] = seen
        words = [values["run"], *(word for key, value in options.items() for word in (f"--{key}", str(value)))]
        text += f"next: beeline archive build {shlex.join(words)}"
    result(values, as_json, text)
    if not is_within and not running:
        fail()


def measured(run: Run, data: DataSet, served: Mapping[str, Any]) -> tuple[Report, float]:
    """Return how a run judges validation pictures, as an archive of its engine and precision, and its milliseconds.

    Those are the median of the forward pass, a picture of a batch of eight, with one thread.
    """
    from archive.sandbox import Sandbox
    from cli.archive import pack
    from train.evaluate import evaluate
    from train.export import export

    export(run)
    with tempfile.TemporaryDirectory(prefix="beeline-search-") as scratch:
        store, known = Path(scratch) / "store", (data.train.labelled(), data.name)
        asked = served.get("engine"), served.get("precision")
        pictures = _pictures(data, served, Path(scratch) / "pictures"), None
        pack(run.export, store, asked=asked, pictures=pictures, verify=False, known=known)
        with Sandbox(next(store.glob("*.mar")), batch_size=_BATCH, environment={"BEELINE_THREADS": "1"}) as sandbox:
            answers = evaluate(sandbox.predict, data.val)
            sandbox.take([one.path.read_bytes() for one in data.val.pictures[: 2 * _BATCH]])
            batch = min(_BATCH, len(data.val))
            samples = sandbox.time_stages(batch, _REPEATS, _SECONDS)["forward"]
    return answers, statistics.median(samples) / batch


def _pictures(data: DataSet, served: Mapping[str, Any], folder: Path) -> Path | None:
    """Link training pictures, by which a variant is calibrated and compared, since the others judge; None for fp32."""
    from host.files import whole_folder

    if (served.get("engine"), served.get("precision")) in ((None, None), ("torch", "fp32")):
        return None
    with whole_folder(folder) as fresh:
        for i, one in enumerate(data.train.pictures):
            (fresh / f"{i}{one.path.suffix}").symlink_to(one.path.absolute())
    return folder


def _final(study: Search, chosen: FrozenTrial, found: Plan) -> dict[str, Any]:
    """Train the chosen settings and the default on all training pictures, and compare both on the validation pictures.

    The run keeps the comparison, and its archive's card shows it.
    """
    from train.config import quoted
    from train.evaluate import compare, evaluate
    from train.export import export
    from train.predictor import RunPredictor
    from train.runs import finish, open_run

    both: list[tuple[Run, Report, float | None]] = []
    words = [f"data.folder={quoted(found.config.data.folder)}"]
    default_params = study.space.default()
    # The picked run is the last, so `latest` names it.
    for params in [chosen.params] if chosen.params == default_params else [default_params, chosen.params]:
        run = study.train(params, *words, runs=study.runs)
        if study.measure:
            both.append((run, *study.measure(run, found.data, params)))
        else:
            both.append((run, evaluate(RunPredictor(run.folder).predict, found.data.val), None))
    (default, plain, others), (run, report, ms) = both[0], both[-1]
    verdict, p = compare(report, plain)
    sentence = f"picked by a search of {len(study.done)} trials"
    if run is default:
        sentence += ", the first of them"
    else:
        sentence += f"; compared with {default.config().model.name} at the first trial's settings"
        sentence += f", on {len(found.data.val)} validation pictures: {verdict}"
        sentence += f"; {ms:.2f} ms instead of {others:.2f}" if ms is not None and others is not None else ""
    finish(run.folder, {**run.record, "search": sentence})
    export(open_run(run.folder))
    times = {"milliseconds": ms, "default_milliseconds": others}
    accuracies = {"accuracy": report.top1, "default_accuracy": plain.top1, "p": p}
    return {"run": str(run.folder), "settings": chosen.params, **accuracies, **times, "sentence": sentence}
