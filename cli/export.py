"""`beeline archive export`: an archive in the form of another server."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from beeline.errors import BeelineError
from cli.console import Json, result


def export(
    mar: Annotated[Path, typer.Argument(help="A .mar file, or the name of one in model_store.")],
    to: Annotated[str, typer.Option(help="The form: triton or sagemaker.")],
    out: Annotated[Path, typer.Option(help="The folder to write, such as Triton's model repository.")],
    backend: Annotated[str, typer.Option(help="python (the handler), or onnxruntime (its graph alone).")] = "python",
    preferred: Annotated[str | None, typer.Option(help="Batch sizes to send on at once, as 4,8.")] = None,
    gpus: Annotated[str | None, typer.Option(help="Numbers of the GPUs, as 0,1. [none: the CPU]")] = None,
    number: Annotated[int, typer.Option(min=1, help="The version in the repository.")] = 1,
    config: Annotated[Path | None, typer.Option(help="Batch size, delay, workers. [config/config.properties]")] = None,
    as_json: Json = False,
) -> None:
    """Write an archive in the form of another server; BATCH_SIZE, WORKERS and LINGER_MS win over --config."""
    from archive.store import locate
    from beeline.errors import did_you_mean

    if to not in _FORMS:
        raise BeelineError(f"--to is {to!r}{did_you_mean(to, _FORMS)}")
    options = {"backend": backend, "version": number, "config": config, "preferred": preferred, "gpus": gpus}
    values, text = _FORMS[to](locate(mar), out, options)
    result(values, as_json, text)


def _triton(mar: Path, out: Path, options: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Write a repository for Triton, with the numbers of `config.properties` unless an option has another."""
    import os

    from archive import triton
    from archive.mar import read
    from beeline.errors import did_you_mean
    from host import ROOT, machine
    from serve import config, properties

    gpus, preferred = (_wholes(f"--{name}", options[name]) for name in ("gpus", "preferred"))
    file = properties.load(options["config"] or ROOT / "config" / "config.properties", os.environ)
    # On GPUs an instance each, unless the file has another number; memory is the other machine's.
    environ, of_gpus = os.environ, len(gpus[:1])
    resolved = config.resolve(file, [read(mar)], config.Overrides(), environ, machine.cores(), of_gpus, 1 << 40)
    (model,), queue = resolved.models, resolved.numbers["job_queue_size"].value
    chosen = (model.batch_size.value, model.max_batch_delay.value, model.min_workers.value)
    numbers = triton.Numbers(*chosen, gpus, preferred, queue)
    graph: triton.WriteGraph | None = None
    note = ""
    if (backend := options["backend"]) == "onnxruntime":
        from archive.triton.graph import write

        graph, note = write, " (replayed by ONNX Runtime; not run on Triton)"
    elif backend != "python":
        raise BeelineError(f"--backend is {backend!r}{did_you_mean(backend, ('python', 'onnxruntime'))}")
    folder = triton.export(mar, out, numbers, options["version"], graph)
    values = {"model": str(folder), "version": options["version"], **vars(numbers), "not_run": bool(note)}
    return values, f"{folder}: version {options['version']}{note}; {'; '.join(resolved.lines()[:1])}"


def _sagemaker(mar: Path, out: Path, options: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Write model.tar.gz; the numbers are the container's."""
    from serve.sagemaker import export

    usual = {"backend": "python", "version": 1}
    if given := [name for name, value in options.items() if value != usual.get(name)]:
        raise BeelineError(
            f"--to sagemaker takes no numbers, and {given[0]} is {options[given[0]]!r}; docs/aws.md says how"
        )
    path = export(mar, out)
    return {"path": str(path), "bytes": path.stat().st_size}, f"{path}: {path.stat().st_size / 1e6:.1f} MB"


# By form, what writes an archive in it: returns facts for programs and for people.
_FORMS: dict[str, Callable[[Path, Path, dict[str, Any]], tuple[dict[str, Any], str]]] = {
    "triton": _triton,
    "sagemaker": _sagemaker,
}


def _wholes(option: str, text: str | None) -> tuple[int, ...]:
    """Return the whole numbers of an option such as `4,8`, sorted; raise BeelineError for another text."""
    if not re.fullmatch(r"(\d+(,\d+)*)?", text or ""):
        raise BeelineError(f"{option} is {text!r}; allowed: whole numbers with commas, as 0,1")
    return tuple(sorted({int(part) for part in (text or "").split(",") if part}))
