"""`beeline train`: pictures in, a finished run with its exported model out."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from beeline.errors import BeelineError
from cli.console import Json, result, say
from host import ROOT


def train(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, as model.name=resnet34; task=caption: captions")
    ] = None,
    data: Annotated[str | None, typer.Option(help="A folder, one a label; a CSV; a zip's URL. [BEELINE_DATA]")] = None,
    generated: Annotated[bool, typer.Option("--generated", help="Draw the pictures, even where others are.")] = False,
    weights: Annotated[
        Path | None, typer.Option(help="A state dict or safetensors to start from. [BEELINE_WEIGHTS]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything that is random. [0]")] = None,
    runs: Annotated[Path, typer.Option(help="Where runs are kept.", show_default="runs/")] = ROOT / "runs",
    golden: Annotated[Path | None, typer.Option(help="Your own golden pictures instead of made ones.")] = None,
    blind_to: Annotated[list[str] | None, typer.Option(help="A mistake that goldens may miss: exif ...")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Half a minute: the head alone, or small pictures.")] = False,
    archive: Annotated[bool, typer.Option("--archive", help="Build the archive, too.")] = False,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with a run that was interrupted: its folder, or its id.")
    ] = None,
    reuse: Annotated[bool, typer.Option("--reuse", help="Take a finished run with the same fingerprint.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Train in so many processes, as one a GPU.")] = 1,
    safetensors: Annotated[Path | None, typer.Option(help="Write the trained weights to this file, too.")] = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a classifier on a folder of pictures, and export it; settings are in config/train/."""
    import time

    launched = "TORCHELASTIC_RUN_ID" in os.environ
    if processes > 1 and (quick or "task=caption" in (overrides or ())):
        say(f"--processes {processes} is not needed: --quick and task=caption train in one process")
        processes = 1
    if launched or processes > 1:
        from train import parallel

        if not launched:
            raise typer.Exit(parallel.launch(processes))
        parallel.join()
        if parallel.rank():
            from train.fit import follow

            return follow()

    from archive.store import STORE
    from host.files import check_writable
    from train.config import QUICK, quoted
    from train.plan import plan, resumed
    from train.runs import find_run, find_unfinished, open_run

    if "task=caption" in (overrides or ()):
        if any((data, generated, weights, golden, blind_to, quick, resume, reuse, safetensors)):
            raise BeelineError("task=caption draws its pictures; its options are --seed, --runs, --archive and --json")
        words = [word for word in overrides or () if word != "task=caption"]
        _captions([*words, *([] if seed is None else [f"seed={seed}"])], runs, archive, as_json)
        return
    if safetensors is not None and not safetensors.parent.is_dir():
        raise BeelineError(f"--safetensors is {safetensors}, whose folder is missing; make it, or name another")
    for folder in (runs, *([STORE] if archive else [])):
        check_writable(folder)
    begun = time.monotonic()
    options = {"data.folder": data, "model.weights": weights, "seed": seed}
    words = [*(overrides or []), *(f"{key}={quoted(value)}" for key, value in options.items() if value is not None)]
    if resume is not None:
        if words or generated or quick:
            raise BeelineError(f"--resume {resume} trains as it was planned; leave overrides and other options out")
        resume = resume if resume.is_dir() else runs / resume
        planned = resumed(resume, say)
    else:
        planned = plan(words, say, generated=generated, quick=quick)
    if blind_to:
        from archive.goldens.mistakes import check_names

        check_names(blind_to)
    if golden is not None:
        from archive.goldens import read_given

        read_given(golden)
    data_done = time.monotonic()
    # A run of all epochs is better than a quick one.
    plans = [replace(planned, config=planned.whole), planned] if planned.whole else [planned]
    old = next(filter(None, (find_run(each.fingerprint, runs) for each in plans)), None) if reuse else None
    if old is not None:
        run = open_run(old)
        say(f"nothing changed since the run {run.id}")
    else:
        from train.fit import fit

        run = fit(planned, say, runs, resume or find_unfinished(planned.fingerprint, runs))
    fit_done = time.monotonic()
    from train.export import export, network

    spec = export(run, planned.config.export, golden, tuple(blind_to or ()))
    exported = time.monotonic()
    if safetensors is not None:
        from archive.artifact import write_safetensors

        write_safetensors(network(run), safetensors)
    pictures = sum(run.record["data"]["val"].values())
    note = " These were GENERATED pictures, no photographs." if run.record["data"]["generated"] else ""
    values: dict[str, Any] = {
        "run": str(run.folder),
        "export": str(run.export),
        "reused": old is not None,
        "stages": {
            "data": round(data_done - begun, 1),
            "fit": round(fit_done - data_done, 1),
            "export": round(exported - fit_done, 1),
        },
        "accuracy": run.accuracy,
        "recipe": QUICK.get(run.record["recipe"]["value"]),
        "pictures": pictures,
        "seconds": run.record["seconds"],
        "seed": planned.config.seed,
        "labels": list(run.labels),
        "data": run.record["data"]["name"],
        "generated": run.record["data"]["generated"],
        "weights": run.record["weights"]["name"],
        "fingerprint": run.fingerprint,
        "model_fingerprint": spec.fingerprint(),
        "samples": {
            label: [str(one.path) for one in planned.data.val.pictures if one.truth == index][:5]
            for index, label in enumerate(planned.data.labels)
        },
    }
    shown = run.folder.relative_to(Path.cwd()) if run.folder.is_relative_to(Path.cwd()) else run.folder
    text = (
        f"{run.id}: accuracy {run.accuracy:.4f} on {pictures} validation pictures after the last epoch, "
        f"fitted in {run.record['seconds']:.0f} s.{note}\n"
    )
    if archive:
        from cli.archive import pack

        known = planned.data.val.labelled(), planned.data.name
        values["archive"], about = pack(run.export, reuse=reuse, known=known)
        values["stages"]["archive"] = round(time.monotonic() - exported, 1)
        text += about
    else:
        text += f"next: beeline archive build {shown}"
    result(values, as_json, text)


def _captions(overrides: list[str], runs: Path, archive: bool, as_json: bool) -> None:
    """Train the small captioning model on drawn pictures."""
    from train import caption

    run, spec = caption.fit(caption.compose(overrides), runs, say)
    assert spec.accuracy is not None
    right, count = spec.accuracy.top1, spec.accuracy.pictures
    values: dict[str, Any] = {"run": str(run), "export": str(run / "export"), "exact": right, "pictures": count}
    text = f"{run.name}: {right:.4f} of {count} held-out captions exactly right. GENERATED pictures, no photographs.\n"
    if archive:
        from cli.archive import pack

        values["archive"], about = pack(run / "export")
    result(values, as_json, text + (about if archive else f"next: beeline archive build {run}"))
