"""`beeline archive`: build, verify, inspect, list and run `.mar` archives."""

from __future__ import annotations

import re
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from beeline.errors import BeelineError, did_you_mean
from cli.console import Json, fail, result, say
from cli.export import export

if TYPE_CHECKING:
    from archive.samples import Known, Sample

app = typer.Typer(help="Build, verify, inspect and run archives.", no_args_is_help=True, add_completion=False)

# The least agreement with fp32, and the most that probabilities may move.
_GATE = (0.99, 0.1)
# Options for what an exported folder has decided; a panel names the ways to build that they are for.
_of_model = partial(typer.Option, rich_help_panel="Only with --model")
_of_caption = partial(typer.Option, rich_help_panel="Only with --task caption")
_of_both = partial(typer.Option, rich_help_panel="Only with --model or --task caption")
Store = Annotated[Path | None, typer.Option(help="Folder of archives. [default: model_store]")]
Mar = Annotated[Path, typer.Argument(help="A .mar file, or the name of one in model_store.")]
Server = Annotated[str, typer.Option(help="The server whose context the handler gets: torchserve or mms.")]


@app.command()
def build(
    context: typer.Context,
    source: Annotated[
        Path | None, typer.Argument(help="A run (latest: the newest), an exported folder, or image_classifier's .mar.")
    ] = None,
    model: Annotated[Path | None, _of_model(help="TorchScript, .pt2, ONNX, state dict or safetensors.")] = None,
    labels: Annotated[Path | None, _of_model(help="One a line, JSON, YAML or CSV.")] = None,
    preset: Annotated[
        str | None,
        _of_model(help="imagenet, half, unit, clip, torchvision, timm, or a weights name. [default: imagenet; timm's]"),
    ] = None,
    task: Annotated[
        str, typer.Option(help="caption: the source is a BLIP checkpoint, a folder or a hub's name.")
    ] = "classify",
    beams: Annotated[int, _of_caption(min=1, help="Beams of the search, 1 for greedy.")] = 1,
    max_tokens: Annotated[int, _of_caption(min=1, help="Tokens at most.")] = 20,
    prompt: Annotated[str, _of_caption(help="What each begins with.")] = "",
    architecture: Annotated[str | None, _of_model(help="torchvision's name, or timm:NAME; for weights.")] = None,
    name: Annotated[str | None, _of_both(help="The model's name. [default: architecture or file]")] = None,
    version: Annotated[str | None, _of_both(help="The model's version. [default: 1.0]")] = None,
    output: Annotated[str | None, _of_model(help="logits, probabilities or scores. [what its outputs show]")] = None,
    output_key: Annotated[str | None, _of_model(help="Which entry of a dict or tuple it returns.")] = None,
    uint8_input: Annotated[bool, _of_model("--uint8-input", help="It takes uint8 NHWC and normalises it.")] = False,
    resize: Annotated[int | None, _of_model(help="Shorter side in pixels, over the preset's.")] = None,
    crop: Annotated[str | None, _of_model(help="Middle crop, as 224 or 320x240 (width x height).")] = None,
    fit: Annotated[str | None, _of_model(help="crop, squash, pad or centre. [crop]")] = None,
    interpolation: Annotated[str | None, _of_model(help="Resize filter, over the preset's.")] = None,
    channels: Annotated[str, _of_model(help="The order in which it takes colours: rgb or bgr.")] = "rgb",
    mean: Annotated[str | None, _of_model(help="R,G,B of 0..1, over the preset's.")] = None,
    std: Annotated[str | None, _of_model(help="R,G,B of 0..1, over the preset's.")] = None,
    top_k: Annotated[int, _of_model(help="Labels an answer holds at most.")] = 5,
    licence: Annotated[str, _of_both(help="The model's licence.")] = "unknown",
    data: Annotated[str, _of_both(help="The pictures it was trained on.")] = "unknown",
    weights: Annotated[str | None, _of_both(help="Where its weights are from. [default: file]")] = None,
    golden: Annotated[Path | None, _of_both(help="Your own golden pictures instead of made ones.")] = None,
    blind_to: Annotated[
        list[str] | None, _of_both(help="A mistake that goldens may miss: exif ...; repeat it.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="torch, torch_compile, openvino, onnxruntime; auto: the fastest. [openvino; with CUDA torch]"
        ),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16, fp16, int8 or auto. [default: fp32; auto with --engine auto]")
    ] = None,
    pictures: Annotated[Path | None, typer.Option(help="Photographs to judge a fast variant by.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Photographs to calibrate and control int8 by. [default: half of --pictures]")
    ] = None,
    agreement: Annotated[float, typer.Option(help="Fraction of first labels that must be fp32's.")] = _GATE[0],
    decoding: Annotated[
        str, typer.Option(help="full; scaled: large JPEGs at a half, a quarter ...; cuda: JPEGs on the CUDA device.")
    ] = "full",
    moved: Annotated[float, typer.Option(help="How far probabilities may move on 99 of 100 pictures.")] = _GATE[1],
    handler: Annotated[Path | None, typer.Option(help="A file with one subclass of VisionHandler.")] = None,
    model_config: Annotated[Path | None, typer.Option(help="A model-config.yaml to put in.")] = None,
    samples: Annotated[Path | None, typer.Option(help="Pictures for the page. [of the run's validation]")] = None,
    store: Store = None,
    verify: Annotated[bool, typer.Option(help="Verify before the store changes.")] = True,
    reuse: Annotated[bool, typer.Option("--reuse", help="Keep an archive of the same content.")] = False,
    default: Annotated[bool, typer.Option("--default", help="Make it the model's default version.")] = False,
    sign: Annotated[Path | None, typer.Option(help="minisign's secret key, without a password, to sign with.")] = None,
    as_json: Json = False,
) -> None:
    """Build a reproducible archive from a run, or from a model file with its labels."""
    from archive.samples import named_samples
    from archive.store import STORE
    from archive.store import sign as sign_archive
    from beeline.spec import Provenance
    from beeline.tasks import TASKS
    from cli.sources import exported_folder
    from host.files import check_writable

    if task not in TASKS:
        raise BeelineError(f"--task is {task!r}{did_you_mean(task, tuple(TASKS))}")
    if (source is None) == (model is None):
        which = "both a source and --model are" if source else "neither a source nor --model is"
        raise BeelineError(f"{which} given; name a run or an exported folder, or --model FILE --labels FILE")
    way = "--task caption" if task == "caption" else "--model" if model or str(source).endswith(".mar") else ""
    _check_options(context, way, source)
    check_writable(store or STORE)
    page = named_samples(samples) if samples else None
    with tempfile.TemporaryDirectory(prefix="beeline-export-") as scratch:
        if source is not None and task == "caption":
            from archive.caption import export_checkpoint

            say(f"exporting {source} and making golden pictures ...")
            writing: dict[str, Any] = {"beams": beams, "max_tokens": max_tokens, "prompt": prompt}
            export, origin = Path(scratch) / "export", Provenance(data, False, weights or source.name, licence)
            named = name or source.name, version or "1.0"
            export_checkpoint(source, export, named, origin, golden, tuple(blind_to or ()), **writing)
        elif source is not None and not way:
            export = exported_folder(source)
        else:
            from archive.architectures import TIMM
            from archive.artifact import load_network
            from archive.export import ExportRequest, export_folder, find_preset
            from archive.foreign import unpack
            from archive.hugging_face import refusal
            from archive.labels import read_labels

            given = unpack(source, Path(scratch) / "given") if source else None
            model, labels = (given.weights, labels or given.labels) if given else (model, labels)
            assert model is not None
            if labels is None:
                why = f"the model {source or model} has no labels; add --labels FILE, one a line in output order"
                raise BeelineError(refusal(model) or why)
            chosen = find_preset(preset, architecture).override(
                mean=_numbers("mean", mean),
                std=_numbers("std", std),
                channels=channels,
                takes_uint8=uint8_input,
                resize=resize,
                interpolation=interpolation,
                **_shape(crop, fit),
            )
            request = ExportRequest(
                name=name or (given.name if given else (architecture or model.stem).removeprefix(TIMM)),
                version=version or (given.version if given else "1.0"),
                labels=read_labels(labels),
                preprocessing=chosen,
                architecture=architecture or "unknown",
                output=output,
                output_key=output_key,
                top_k=top_k,
                provenance=Provenance(data=data, weights=weights or model.name, licence=licence),
                golden_pictures=golden,
                blind_to=tuple(blind_to or ()),
            )
            export = Path(scratch) / "export"
            say(f"exporting {model} as {request.name} {request.version} and making golden pictures ...")
            if given:
                export_folder(given.network(architecture), request, export, say)
                given.compare(export, say)
            else:
                network = load_network(model, architecture, chosen.is_imagenets, say)
                export_folder(network, request, export, say)
        values, text = pack(
            export,
            store,
            asked=(engine, precision),
            pictures=(pictures, calibration),
            gate=(agreement, moved),
            decoding=decoding,
            files=(handler, model_config, samples),
            page=page,
            verify=verify,
            reuse=reuse,
            default=default,
        )
        if sign is not None:
            values["signature"] = str(sign_archive(Path(values["archive"]), sign))
    result(values, as_json, text)


@app.command("sign")
def sign_(mar: Mar, key: Annotated[Path, typer.Option(help="minisign's secret key, without a password.")]) -> None:
    """Sign an archive; a server with `beeline_trusted_key` serves only what that key signed."""
    from archive.store import locate, sign

    say(f"signed: {sign(locate(mar), key)}")


@app.command()
def verify(
    mar: Mar,
    server: Server = "torchserve",
    key: Annotated[
        str | None, typer.Option(help="minisign's public key, or its file, that must have signed it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check that an archive is safe and whole, and answers its golden pictures in a clean process."""
    from archive import verify as room
    from archive.store import check_signature, locate

    if key is not None:
        check_signature(locate(mar), key)
    verified = room.verify(locate(mar), server)
    device = verified.choice.get("device", ["unknown device"])[0]
    text = (
        f"{verified.mar}: {verified.spec.name} {verified.spec.version} holds; {verified.pictures} golden pictures "
        f"agree on {device}; loaded in {verified.load_seconds:.1f} s, fingerprint {verified.spec.fingerprint()[:12]}"
    )
    result(verified.to_dict(), as_json, text)


@app.command()
def inspect(mar: Mar, as_json: Json = False) -> None:
    """Show an archive's card, without running anything of it."""
    from archive import inspect as room
    from archive.store import locate

    card = room.card(locate(mar))
    result(card.to_dict(), as_json, "\n".join(f"{name:<12} {text}" for name, text in card.rows()))


@app.command("list")
def list_(store: Store = None, as_json: Json = False) -> None:
    """List the store's archives and compare them with its index; exit 1 if one is changed or missing."""
    from archive.store import STORE, listing

    rows, lines = [], []
    for item in listing(store or STORE):
        row: dict[str, object] = {"file": item.file, "state": item.state, "reason": item.reason}
        about, entry = "?", item.entry
        if entry is not None:
            row |= {"name": entry.name, "version": entry.version, "default": entry.default, "sha256": entry.sha256}
            is_default = " (default)" if entry.default else ""
            about = f"{entry.name} {entry.version}{is_default}, {entry.bytes / 1e6:.1f} MB, sha256 {entry.sha256[:12]}"
        rows.append(row)
        lines.append(f"{item.file}  {item.state}  {about}" + ("" if item.state == "ok" else f": {item.reason}"))
    text = "\n".join(lines) or "the store is empty; build one with `beeline archive build`"
    result({"archives": rows}, as_json, text)
    if any(row["state"] in ("changed", "missing") for row in rows):
        fail()


@app.command()
def run(
    mar: Mar,
    pictures: Annotated[list[Path], typer.Argument(help="Picture files, or folders of them.")],
    server: Server = "torchserve",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures that one call of the handler gets at most.")] = 16,
    as_json: Json = False,
) -> None:
    """Call an archive's handler with pictures, without a server; a failure shows the handler's own traceback."""
    from archive.sandbox import Sandbox, WorkerTraceback
    from archive.store import locate
    from host.files import find_pictures

    paths = find_pictures(pictures, say)
    rows = []
    try:
        with Sandbox(locate(mar), server=server, batch_size=batch_size) as sandbox:
            for start in range(0, len(paths), batch_size):
                chunk = paths[start : start + batch_size]
                for path, answer in zip(chunk, sandbox.predict([path.read_bytes() for path in chunk]), strict=True):
                    parts = {"status": answer.status, "headers": answer.headers, "body": answer.body}
                    rows.append({"picture": str(path), **parts})
    except BeelineError as error:
        if isinstance(error.__cause__, WorkerTraceback):
            say(str(error.__cause__))
        raise
    text = "\n".join(f"{row['picture']}  {row['status']}  {row['body']}" for row in rows)
    result({"archive": str(mar), "pictures": rows, "choice": sandbox.choice}, as_json, text)
    if any(row["status"] != 200 for row in rows):
        fail()


app.command()(export)


def pack(
    export: Path,
    store: Path | None = None,
    *,
    asked: tuple[str | None, str | None] = (None, None),
    pictures: tuple[Path | None, Path | None] = (None, None),
    gate: tuple[float, float] = _GATE,
    decoding: str = "full",
    files: tuple[Path | None, Path | None, Path | None] = (None, None, None),
    page: list[Sample] | None = None,
    verify: bool = True,
    reuse: bool = False,
    default: bool = False,
    known: Known | None = None,
) -> tuple[dict[str, Any], str]:
    """Build an archive of an exported folder; return its facts for programs and for people.

    Arguments are the options of `build`: `files` are `--handler`, `--model-config` and `--samples`, and `page` the
    chosen samples. `known` are the validation pictures of the export's run, which are else looked for.
    """
    from archive import build as room
    from archive import samples, variants
    from archive.store import STORE

    handler, config, folder = files
    store, pictures_of_run = store or STORE, cache(lambda: known or _validation(export))
    options = (*asked, *pictures, handler, config)
    origin = room.origin(export) if (gate, decoding) == (_GATE, "full") and not any(options) else None
    built, measured = room.unchanged(export, store, origin) if reuse and origin and not default else None, None
    if built is None:
        with tempfile.TemporaryDirectory(prefix="beeline-variant-") as scratch:
            made, measured = variants.prepare(
                export, Path(scratch), asked, pictures, gate, decoding, say, pictures_of_run
            )
            say("building" + (" and verifying ..." if verify else " ..."))
            builds = partial(room.build, made, store, handler=handler, config=config)
            built = builds(check=verify, reuse=reuse, default=default, measured=measured, origin=origin)
    placed, about = samples.put(store, built.spec, built.reused, folder, page, pictures_of_run)
    if lacking := needed_package(built.spec.engine):
        say(lacking)
    say(about)
    values = {**built.to_dict(), "measured": measured, "samples": str(placed) if placed else None}
    proof = f"{built.verified.pictures} golden pictures agree" if built.verified else "not verified"
    proof = "the same as before" if built.reused else proof
    text = f"{built.path}: {built.bytes / 1e6:.1f} MB in {built.seconds:.1f} s, sha256 {built.sha256[:12]}, {proof}"
    return values, text


def _check_options(context: typer.Context, way: str, source: Path | None) -> None:
    """Refuse, and do not ignore, an option that the way to build does not take; none is that of an exported folder."""
    for parameter in context.command.params:
        panel, value = getattr(parameter, "rich_help_panel", None), context.get_parameter_source(parameter.name or "")
        if not panel or getattr(value, "name", "") != "COMMANDLINE" or (way and way in panel):
            continue
        option, ways = parameter.opts[0], panel.removeprefix("Only with ")
        if way:
            fix = "leave it out" + (", and name a checkpoint as the source" if way != "--model" else "")
            raise BeelineError(f"{option} is given with {way}, and is an option of {ways}; {fix}")
        what = f"{option} is given with the exported folder {source}, which has settled that"
        words = "export.name=..., export.version=..., export.top_k=..."
        raise BeelineError(f"{what}; give it to `beeline train` ({words}), or use {ways}")


def _numbers(key: str, text: str | None) -> list[float] | None:
    """Return the numbers of an option such as `0.5,0.5,0.5`; a single one counts for each channel."""
    try:
        numbers = None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise BeelineError(f"--{key} is {text!r}; allowed: three numbers, as 0.5,0.5,0.5, or one") from error
    return 3 * numbers if numbers and len(numbers) == 1 else numbers


def _shape(crop: str | None, fit: str | None) -> dict[str, object]:
    """Return the fields of `Geometry` of `--crop` and `--fit`."""
    if crop is None:
        return {"fit": fit}
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", crop)
    if match is None:
        raise BeelineError(f"--crop is {crop!r}; allowed: pixels, as 224, or width x height, as 320x240")
    width, height = int(match[1]), int(match[2] or match[1])
    return {"fit": fit, "crop": height, "width": None if width == height else width}


def needed_package(engine: str) -> str | None:
    """Return a sentence on what an engine needs that the images lack; None for an engine that they contain."""
    from beeline.engines import runtime

    if engine in ("torch", "openvino"):
        return None
    lacking = "a C++ compiler" if engine == "torch_compile" else f"the package {runtime(engine)}"
    return f"the engine {engine} needs {lacking}, which the images lack; for them use --engine openvino"


def _validation(export: Path) -> Known:
    """Return the validation pictures of the run that an export is in, and the name of the data; or none, and why."""
    folder = export.resolve().parent
    if not (folder / "run.json").is_file():
        return [], "the model did not come from a run; --samples FOLDER names some"
    from train.runs import open_run, validation_pictures

    try:
        run = open_run(folder)
        return validation_pictures(run).labelled(), str(run.record["data"]["name"])
    except BeelineError as error:
        return [], f"{error}, or name others with --samples FOLDER"
