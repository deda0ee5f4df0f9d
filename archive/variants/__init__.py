"""Fast variants of an exported folder: another engine or precision, proved to answer like the fp32 reference."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from archive.samples import Known
from archive.variants import agreement, convert
from archive.variants.agreement import Gate, Pictures
from beeline import engines, pixels
from beeline.classification import probabilities
from beeline.errors import ArchiveError, BeelineError, ConfigError, did_you_mean, short
from beeline.golden import Forward, replay
from beeline.settings import Choice
from beeline.spec import DECODINGS, EXPECTED, FILE_NAME, GOLDEN, Artifact, ModelSpec
from host import Say, machine
from host.files import write_json

if TYPE_CHECKING:  # The default engine is found without importing torch.
    from archive.goldens.mistakes import Photometry

# With a larger tolerance the golden pictures could miss a real mistake.
_MOST_TOLERANCE = 0.15
_MARGIN = 1.5
_BATCH, _SAMPLES = 8, 7
# The default engine is called slower from this ratio on, since times vary.
_SLOWER = 1.1


@dataclass(frozen=True)
class Converter:
    """What makes the artifact of one engine; by precision, the packages that it needs besides the engine's own."""

    convert: Callable[[Path, ModelSpec, Path, str, Pictures, Gate], Artifact]
    packages: Mapping[str, tuple[str, ...]]


CONVERTERS = {
    "torch": Converter(convert.to_torch, {"bf16": (), "fp16": ()}),
    "torch_compile": Converter(convert.to_torch_compile, {"fp32": (), "bf16": (), "fp16": ()}),
    "openvino": Converter(convert.to_openvino, {"fp32": (), "bf16": (), "int8": ("nncf",)}),
    "onnxruntime": Converter(convert.to_onnx, {"fp32": ("onnx", "onnxscript"), "int8": ("onnx", "onnxscript", "nncf")}),
}


@dataclass(frozen=True)
class Variant:
    """An engine and a precision."""

    engine: str
    precision: str

    def __str__(self) -> str:
        return f"{self.engine} {self.precision}"


REFERENCE = Variant("torch", "fp32")
# Of an ONNX model.
ONNX_REFERENCE = Variant("onnxruntime", "fp32")
# What is built for CPUs where no engine is named.
ON_CPUS = Variant("openvino", "fp32")


def default_engine(environ: Mapping[str, str] = os.environ) -> Choice:
    """Return the engine of a build that names none: `openvino` for CPUs, `reference` elsewhere."""
    if environ.get("BEELINE_DEVICE") != "cpu" and (gpus := machine.gpus()):
        return Choice("reference", f"a CUDA device is there ({gpus[0]})")
    if importlib.util.find_spec("openvino") is None:
        return Choice("reference", "openvino is not installed here")
    return Choice("openvino", "the default on CPUs")


def known(reference: Variant = REFERENCE) -> list[Variant]:
    """Return every variant that can be made of an export, its reference first."""
    made = [Variant(name, precision) for name, made in CONVERTERS.items() for precision in made.packages]
    if reference == ONNX_REFERENCE:
        made = [each for each in made if each != reference and not each.engine.startswith("torch")]
    return [reference, *made]


def left_out(variant: Variant, decoding: str = "full", timed: bool = True) -> str | None:
    """Return why this machine cannot make a variant (or time it, if `timed`), with the fix; None if it can."""
    if decoding == "cuda" and variant.engine in engines.ON_CPUS:
        return f"--decoding is 'cuda', and {variant.engine} runs on CPUs; take full or scaled, or --engine torch"
    packages = () if variant == REFERENCE else CONVERTERS[variant.engine].packages[variant.precision]
    absent = [name for name in (engines.runtime(variant.engine), *packages) if importlib.util.find_spec(name) is None]
    if absent:
        return f"not installed here: {', '.join(absent)}; install what is missing"
    if variant.engine == "torch_compile":
        from beeline.engines.torch_compile import check_compiler

        try:
            check_compiler(os.environ)
        except ConfigError as error:
            return str(error)
    if variant.precision in ("fp16", "bf16"):
        import torch

        on_torch, bf16 = variant.engine.startswith("torch"), variant.precision == "bf16"
        if on_torch and (torch.cuda.is_available() or (bf16 and not timed)):
            return None
        if not bf16:
            return "fp16 is for CUDA devices, and there is none here; take --precision bf16 or fp32"
        if not torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported():
            # PyTorch then takes 473 ms for a ResNet-18, and 64 in fp32. OpenVINO computes in fp32, so the gate would
            # not judge bf16.
            return "this processor has no bf16; build it on a machine like the one that serves, or take fp32"
    return None


def prepare(
    export: Path,
    scratch: Path,
    asked: tuple[str | None, str | None],
    pictures: tuple[Path | None, Path | None],
    gate: tuple[float, float],
    decoding: str,
    say: Say,
    known: Callable[[], Known] = lambda: ((), ""),
) -> tuple[Path, dict[str, float | str] | None]:
    """Return the folder to build from, and the results of `fastest` or `compared`, where the engine was chosen here.

    Args:
        export: of the fp32 model for PyTorch, or of an ONNX model.
        scratch: a folder for variants.
        asked: engine and precision; each may be `auto`, or None for the reference's; both None for `default_engine`.
        pictures: a folder to judge by, and one to calibrate with.
        gate: the fields of `Gate`.
        decoding: see `Geometry`.
        say: gets each line of progress.
        known: returns pictures of the model's data. The default is judged by them where no folder is
            named, and without any by the golden pictures.

    Raises:
        ConfigError: for an unknown value, a variant that cannot be made here, or missing pictures.
        ArchiveError: when the gate refuses the variant.
    """
    spec = ModelSpec.load(export)
    if spec.task == "caption":
        from archive.variants import caption

        return caption.prepare(export, scratch, asked, pictures, gate, decoding, say)
    reference = Variant(spec.engine, spec.precision)
    if decoding not in DECODINGS:
        raise ConfigError(f"--decoding is {decoding!r}{did_you_mean(decoding, DECODINGS)}")
    geometry = dataclasses.replace(spec.geometry, decoding=decoding)
    judged, calibration = pictures
    if asked == (None, None) and decoding == "full" and calibration is None:
        choice = default_engine()
        if choice.value == ON_CPUS.engine:
            return _by_default(export, scratch, judged, Gate(*gate), say, known, choice.reason)
        say(f"engine: {spec.engine} in fp32, because {choice.reason}")
    candidates = _candidates(reference, *asked)
    if candidates == [reference] and geometry == spec.geometry:
        if judged or calibration:
            given = "--pictures and --calibration are for a fast variant, and this is the fp32 reference"
            raise ConfigError(f"{given}: add --engine, --precision or --decoding, or leave them out")
        return export, None
    if calibration is not None and all(each.precision != "int8" for each in candidates):
        fix = "leave it out, since the gate judges by --pictures, or add --precision int8"
        raise ConfigError(f"--calibration is {calibration}, and only int8 is calibrated; {fix}")
    lone = candidates[0] if len(candidates) == 1 else None
    if lone and (why := left_out(lone, decoding, timed=False)):
        raise ConfigError(f"{lone} cannot be built here: {why}")
    if judged is None:
        raise ConfigError("a variant is judged by pictures; name a folder of photographs with --pictures")
    calibrates = any(each.precision == "int8" and left_out(each, decoding) is None for each in candidates)
    decoded = agreement.read(judged, calibration, geometry, calibrates)
    if not lone:
        say(f"trying {len(candidates)} variants on {len(decoded.judged)} pictures ...")
        return fastest(export, scratch, decoded, Gate(*gate), candidates, say)
    say(f"making {lone} and comparing it with fp32 on {len(decoded.judged)} pictures ...")
    make(export, scratch / "variant", lone, decoded, Gate(*gate))
    return scratch / "variant", None


def _by_default(
    export: Path, scratch: Path, judged: Path | None, gate: Gate, say: Say, known: Callable[[], Known], reason: str
) -> tuple[Path, dict[str, float | str] | None]:
    """Return the default variant's folder with the times of `compared`; where it cannot be made, the export itself."""
    spec = ModelSpec.load(export)
    if judged:
        pictures = agreement.read(judged, None, spec.geometry, calibrates=False)
    else:
        goldens = sorted(path for path in (export / GOLDEN).iterdir() if path.name != EXPECTED)
        labelled, source = known()
        found = agreement.some([path for path, _ in labelled], source, spec.geometry)
        found = found or agreement.some(goldens, "golden pictures", spec.geometry)
        assert found is not None
        pictures = found
    try:
        _, times = compared(export, scratch / "variant", ON_CPUS, pictures, gate)
    except (ArchiveError, ConfigError) as error:
        say(f"engine: {spec.engine} in fp32, because {error}")
        return export, None
    own, reference = times.values()
    than = f"{own:.1f} ms of CPU time a picture, {spec.engine} takes {reference:.1f}"
    say(f"engine: openvino in fp32, {reason}; {than}")
    if own > _SLOWER * reference:
        say(f"warning: openvino is slower than {spec.engine} on this processor; --engine {spec.engine} is faster here")
    return scratch / "variant", dict(times)


def _candidates(reference: Variant, engine: str | None, precision: str | None) -> list[Variant]:
    """Return the variants of an engine and a precision, each of which may be `auto`."""
    choices, engine = known(reference), engine or reference.engine
    for word, option, names in (
        (engine, "--engine", {each.engine for each in choices}),
        (precision, "--precision", {each.precision for each in choices}),
    ):
        if word not in (None, "auto", *names):
            of = "" if reference == REFERENCE else " for an ONNX model"
            raise ConfigError(f"{option} is {word!r}{of}{did_you_mean(str(word), ('auto', *sorted(names)))}")
    precision = precision or ("auto" if engine == "auto" else "fp32")
    chosen = [each for each in choices if engine in ("auto", each.engine) and precision in ("auto", each.precision)]
    if not chosen:
        raise ConfigError(f"there is no {engine} {precision}; allowed: {', '.join(map(str, choices))}")
    return chosen


def make(export: Path, out: Path, variant: Variant, pictures: Pictures, gate: Gate) -> ModelSpec:
    """Do as `compared`, and return the spec alone."""
    return compared(export, out, variant, pictures, gate)[0]


def compared(
    export: Path, out: Path, variant: Variant, pictures: Pictures, gate: Gate
) -> tuple[ModelSpec, dict[str, float]]:
    """Write a variant of an exported folder into the new folder `out`.

    Returns:
        Its spec. Of the variant and of the reference, by name, the milliseconds of CPU time a picture.

    `export` holds the fp32 reference. The variant will decode pictures as `pictures` were decoded. Raise `ArchiveError`
    when the model cannot be converted, or is too far from the reference on the pictures or the golden pictures.
    """
    spec = ModelSpec.load(export)
    if Variant(spec.engine, spec.precision) not in (REFERENCE, ONNX_REFERENCE):
        raise ArchiveError(f"{export} is {spec.engine} {spec.precision} already; a variant is made of the fp32 export")
    out.mkdir()
    try:
        artifact = CONVERTERS[variant.engine].convert(export, spec, out, variant.precision, pictures, gate)
    except (BeelineError, OSError, MemoryError):
        raise
    except Exception as error:
        why = short(error, 300)
        raise ArchiveError(f"{spec.model.file} cannot be made into {variant} ({why}); take another --engine") from error
    draft = dataclasses.replace(spec, model=artifact, geometry=pictures.geometry, tolerance=0.5, **vars(variant))
    # On the device that a worker would take here; some precisions need a CUDA device.
    engine = engines.load(out, draft)
    computed = engine.choice["precision"].value
    if computed != variant.precision:
        why = f"this machine computes it in {computed}, so nothing would judge it"
        raise ArchiveError(f"{variant} is refused: {why}; build it on a machine like the one that serves")
    # Of one thread, CPU time is the time that it takes on a machine without other work.
    reference, clock = engines.load(export, spec, device="cpu"), time.process_time
    times = [clock()]
    expected = agreement.scores(reference.forward, pictures.judged, spec.output)
    times.append(clock())
    actual = agreement.scores(engine.forward, pictures.served, spec.output)
    times.append(clock())
    measured = agreement.measure(expected, actual, pictures.source, spec.output)
    agreement.check(measured, gate, str(variant))
    shutil.copytree(export / GOLDEN, out / GOLDEN)
    photometry = convert.photometry(export, spec)
    names = str(variant), f"{spec.engine} {spec.precision}"
    milliseconds = [1000 * (times[i + 1] - times[i]) / len(pictures.judged) for i in (1, 0)]
    draft = dataclasses.replace(draft, agreement=measured)
    final = with_tolerance(out, draft, engine.forward, photometry, variant, _moved)
    final.save(out / FILE_NAME)
    return final, {name: round(each, 2) for name, each in zip(names, milliseconds, strict=True)}


def fastest(
    export: Path, scratch: Path, pictures: Pictures, gate: Gate, among: Sequence[Variant], say: Say
) -> tuple[Path, dict[str, float | str]]:
    """Make and time the variants in `among`, and return the folder of the fastest; raise `ArchiveError` if none passes.

    Also return, by variant, the milliseconds a picture in batches of eight on one thread, or why it was refused.
    """
    results: dict[str, float | str] = {}
    passed: list[tuple[float, Path]] = []
    for variant in among:
        if why := left_out(variant, pictures.geometry.decoding):
            results[str(variant)] = f"left out: {why}"
            say(f"  {variant} is left out: {why}")
            continue
        folder = export
        try:
            spec = ModelSpec.load(export)
            if (variant, pictures.geometry) != (Variant(spec.engine, spec.precision), spec.geometry):
                folder = scratch / f"{variant.engine}-{variant.precision}"
                make(export, folder, variant, pictures, gate)
            milliseconds = 1000 * _seconds_a_picture(folder, pictures)
        except (ArchiveError, ConfigError) as error:
            results[str(variant)] = str(error)
            say(f"  {variant}: {error}")
            continue
        results[str(variant)] = round(milliseconds, 2)
        passed.append((milliseconds, folder))
        say(f"  {variant}: {milliseconds:.1f} ms a picture")
    if not passed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in results.items())
        raise ArchiveError(f"{reasons}; take --engine auto, which includes the reference")
    return min(passed)[1], results


def _seconds_a_picture(folder: Path, pictures: Pictures) -> float:
    """Return the median seconds a picture of a forward pass, with one thread, on the device a worker takes here."""
    forward = engines.load(folder, ModelSpec.load(folder), threads=1).forward
    batch = pictures.judged[:_BATCH]
    forward(batch)
    samples = []
    for _ in range(_SAMPLES):
        start = time.perf_counter()
        forward(batch)
        samples.append(time.perf_counter() - start)
    return statistics.median(samples) / len(batch)


def with_tolerance(
    folder: Path,
    spec: ModelSpec,
    forward: Forward,
    photometry: Photometry,
    variant: Variant,
    moves: Callable[[ModelSpec, Any, list[dict[str, Any]]], float],
) -> ModelSpec:
    """Return the spec with the variant's tolerance, and prove that the golden pictures still notice mistakes.

    The tolerance is 1.5 times the largest move of a golden probability here, since it may be larger on another CPU. It
    is what `moves` makes of what `forward` returns for the golden pictures, and of their entries. The mistakes that the
    pictures notice on this engine are recorded with them.
    """
    from archive.goldens import mistakes

    path = folder / GOLDEN / EXPECTED
    record = json.loads(path.read_text(encoding="utf-8"))
    bodies = [(folder / GOLDEN / str(entry["file"])).read_bytes() for entry in record["pictures"]]
    replay(folder, spec, forward)
    results = forward(np.stack([pixels.decode(body, spec.geometry) for body in bodies]))
    moved = moves(spec, results, record["pictures"])
    tolerance = max(ModelSpec.tolerance, math.ceil(100 * _MARGIN * moved) / 100)
    if tolerance > _MOST_TOLERANCE:
        raise ArchiveError(f"{variant} is refused: a golden probability moves by {moved:.3f}; take a higher precision")
    spec = dataclasses.replace(spec, tolerance=tolerance)
    seen = mistakes.noticed(folder, spec, forward, bodies, photometry)
    lost = [name for name in mistakes.OF_THE_MODEL if name in record["detects"] and seen.get(name) is False]
    if lost:
        why = f"within its tolerance of {tolerance:g} the golden pictures would not notice {mistakes.MISTAKES[lost[0]]}"
        raise ArchiveError(f"{variant} is refused: {why}; take a higher precision")
    record["detects"] = [name for name in record["detects"] if seen.get(name)]
    write_json(path, record)
    return spec


def _moved(spec: ModelSpec, results: Any, pictures: list[dict[str, Any]]) -> float:
    """Return how far a probability of a golden picture moves at most."""
    return max(
        abs(float(row[spec.labels.index(label)]) - float(value))
        for row, entry in zip(probabilities(results, spec.output), pictures, strict=True)
        for label, value in entry["top"]
    )
