"""A fast variant of an exported folder: another engine or precision, proved to answer as the fp32 reference does."""

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

import numpy as np

from archive.goldens import mistakes
from archive.goldens.mistakes import Photometry
from archive.variants import agreement, convert
from archive.variants.agreement import Gate, Pictures
from beeline import engines, pixels
from beeline.answer import probabilities
from beeline.errors import ArchiveError, BeelineError, ConfigError, did_you_mean
from beeline.golden import Forward, replay
from beeline.spec import DECODINGS, EXPECTED, FILE_NAME, GOLDEN, Artifact, ModelSpec

Say = Callable[[str], None]
# A real mistake could pass goldens that may move by more.
_MOST_TOLERANCE = 0.15
_MARGIN = 1.5
_BATCH, _SAMPLES = 8, 7


@dataclass(frozen=True)
class Converter:
    """What makes the artifact of one engine, and by precision the packages that it needs besides the engine's own."""

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
    """One variant: its engine and precision."""

    engine: str
    precision: str

    def __str__(self) -> str:
        """Return it as a card says it."""
        return f"{self.engine} {self.precision}"


REFERENCE = Variant("torch", "fp32")


def known() -> list[Variant]:
    """Return every variant that can be made, the reference first."""
    return [REFERENCE, *(Variant(name, precision) for name, made in CONVERTERS.items() for precision in made.packages)]


def left_out(variant: Variant, decoding: str = "full", timed: bool = True) -> str | None:
    """Return why a variant cannot be made on this machine, or not be `timed`, with the fix; None where it can."""
    if decoding == "cuda" and variant.engine in engines.ON_CPUS:
        return f"--decoding is 'cuda', and {variant.engine} runs on CPUs; take full or scaled, or --engine torch"
    needed = [engines.runtime(variant.engine)]
    if variant != REFERENCE:
        needed += CONVERTERS[variant.engine].packages[variant.precision]
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if absent:
        return (
            f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed here; install what is missing"
        )
    if variant.engine == "torch_compile":
        from beeline.engines.torch_compile import check_compiler

        try:
            check_compiler(os.environ)
        except ConfigError as error:
            return str(error)
    if variant.precision in ("fp16", "bf16"):
        import torch

        if variant.engine.startswith("torch") and (
            torch.cuda.is_available() or (variant.precision == "bf16" and not timed)
        ):
            return None
        if variant.precision == "fp16":
            return "fp16 is for CUDA devices, and none is there; take --precision bf16 or fp32"
        if not torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported():
            # PyTorch takes 473 ms for a ResNet-18 then, 64 in fp32. OpenVINO computes in fp32, so nothing would judge
            # bf16.
            return (
                "this processor cannot multiply in bf16; build it on a machine like the one that serves, or take "
                "--precision fp32"
            )
    return None


def prepare(
    export: Path,
    scratch: Path,
    asked: tuple[str, str | None],
    pictures: tuple[Path | None, Path | None],
    gate: tuple[float, float],
    decoding: str,
    say: Say,
) -> tuple[Path, dict[str, float | str] | None]:
    """Return the folder to build from, and for `auto` the milliseconds of each variant or why it was refused.

    Args:
        export: of the fp32 model for PyTorch.
        scratch: a folder for variants.
        asked: engine and precision; each may be `auto`.
        pictures: to judge by, and to calibrate with.
        gate: the part of equal first labels, and how far probabilities may move on 99 of 100 pictures.
        decoding: `full`, `scaled` for JPEGs at a part of their size, or `cuda` for JPEGs on the model's device.
        say: takes each line of progress.

    Raises:
        ConfigError: for an unknown value, a variant that cannot be made here, or missing pictures.
        ArchiveError: when the gate refuses it.
    """
    engine, precision = asked
    candidates = _candidates(engine, precision)
    if decoding not in DECODINGS:
        raise ConfigError(f"--decoding is {decoding!r}{did_you_mean(decoding, DECODINGS)}")
    spec = ModelSpec.load(export)
    geometry = dataclasses.replace(spec.geometry, decoding=decoding)
    judged, calibration = pictures
    if candidates == [REFERENCE] and geometry == spec.geometry:
        if pictures != (None, None):
            raise ConfigError(
                "--pictures and --calibration are for a fast variant, and this is the fp32 reference: add --engine, "
                "--precision or --decoding, or leave them out"
            )
        return export, None
    if calibration is not None and all(each.precision != "int8" for each in candidates):
        raise ConfigError(
            f"--calibration is {calibration}, and only int8 is calibrated; leave it out: --pictures judge, or add "
            "--precision int8"
        )
    lone = candidates[0] if len(candidates) == 1 else None
    if lone and (why := left_out(lone, decoding, timed=False)):
        raise ConfigError(f"{lone} cannot be built here: {why}")
    if judged is None:
        raise ConfigError("a variant is judged by pictures; name a folder of photographs with --pictures")
    calibrates = any(each.precision == "int8" and left_out(each, decoding) is None for each in candidates)
    decoded = agreement.read(judged, calibration, geometry, calibrates)
    photometry = convert.photometry(export, spec)
    if lone:
        folder = scratch / "variant"
        folder.mkdir()
        say(f"making {lone} and comparing it with fp32 on {len(decoded.judged)} pictures ...")
        make(export, folder, lone, decoded, Gate(*gate), photometry)
        return folder, None
    say(f"trying {len(candidates)} variants on {len(decoded.judged)} pictures ...")
    return fastest(export, scratch, decoded, Gate(*gate), photometry, candidates, say)


def _candidates(engine: str, precision: str | None) -> list[Variant]:
    """Return the variants of an engine and a precision, each perhaps `auto`.

    Raises:
        ConfigError: for an unknown one, or where no engine has both.
    """
    choices = known()
    for word, option, names in (
        (engine, "--engine", {each.engine for each in choices}),
        (precision, "--precision", {each.precision for each in choices}),
    ):
        if word not in (None, "auto", *names):
            raise ConfigError(f"{option} is {word!r}{did_you_mean(str(word), ('auto', *sorted(names)))}")
    precision = precision or ("auto" if engine == "auto" else "fp32")
    found = [each for each in choices if engine in ("auto", each.engine) and precision in ("auto", each.precision)]
    if not found:
        raise ConfigError(f"there is no {engine} {precision} here; allowed: {', '.join(map(str, choices))}")
    return found


def make(
    export: Path, out: Path, variant: Variant, pictures: Pictures, gate: Gate, photometry: Photometry
) -> ModelSpec:
    """Write a variant of an exported folder into `out`, an empty folder, and return its spec.

    Args:
        export: with the fp32 model for PyTorch and its golden pictures.
        out: where the variant goes.
        variant: engine and precision.
        pictures: of the model's geometry, decoded as the variant is to decode.
        gate: the limits that the variant must keep.
        photometry: of the model's normalisation, to prove that the goldens still notice its absence.

    Raises:
        ArchiveError: when it cannot be converted, or is too far from the reference on the pictures or the goldens.
    """
    spec = ModelSpec.load(export)
    if Variant(spec.engine, spec.precision) != REFERENCE:
        raise ArchiveError(f"{export} is {spec.engine} {spec.precision} already; variants are made of the fp32 export")
    try:
        artifact = CONVERTERS[variant.engine].convert(export, spec, out, variant.precision, pictures, gate)
    except (BeelineError, OSError, MemoryError):
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise ArchiveError(f"{spec.model.file} cannot be made into {variant} ({why}); take another --engine") from error
    made = dataclasses.replace(
        spec,
        model=artifact,
        geometry=pictures.geometry,
        engine=variant.engine,
        precision=variant.precision,
        tolerance=0.5,
    )
    # On the device that a worker here would take; some precisions need a CUDA device.
    engine = engines.load(out, made)
    if engine.choice["precision"].value != variant.precision:
        computed = engine.choice["precision"].value
        raise ArchiveError(
            f"{variant} is refused: this machine computes it in {computed}, so nothing would judge it; build it on a "
            "machine like the one that serves"
        )
    forward = engine.forward
    reference = engines.load(export, spec, device="cpu").forward
    expected = agreement.scores(reference, pictures.judged, spec.output)
    found = agreement.measure(expected, agreement.scores(forward, pictures.served, spec.output), pictures.source)
    agreement.check(found, gate, str(variant))
    shutil.copytree(export / GOLDEN, out / GOLDEN)
    made = _with_tolerance(out, dataclasses.replace(made, agreement=found), forward, photometry, variant)
    made.save(out / FILE_NAME)
    return made


def fastest(
    export: Path,
    scratch: Path,
    pictures: Pictures,
    gate: Gate,
    photometry: Photometry,
    among: Sequence[Variant],
    say: Say,
) -> tuple[Path, dict[str, float | str]]:
    """Make and time every variant; return the folder of the fastest that passes the gate, and what became of each.

    Args:
        export: the fp32 export, which is tried too.
        scratch: a folder for the variants.
        pictures: see `make`.
        gate: see `make`.
        photometry: see `make`.
        among: what to try.
        say: takes each line of progress.

    Returns:
        The folder, and by variant the milliseconds a picture in batches of eight on one thread, or why it was refused.

    Raises:
        ArchiveError: when none passes.
    """
    results: dict[str, float | str] = {}
    passed: list[tuple[float, Path]] = []
    for variant in among:
        folder = export
        if why := left_out(variant, pictures.geometry.decoding):
            results[str(variant)] = f"left out: {why}"
            say(f"  {variant} is left out: {why}")
            continue
        try:
            if variant != REFERENCE or pictures.geometry != ModelSpec.load(export).geometry:
                folder = scratch / f"{variant.engine}-{variant.precision}"
                folder.mkdir()
                make(export, folder, variant, pictures, gate, photometry)
            took = 1000 * _seconds_a_picture(folder, pictures)
        except (ArchiveError, ConfigError) as error:
            results[str(variant)] = str(error)
            say(f"  {variant}: {error}")
            continue
        results[str(variant)] = round(took, 2)
        passed.append((took, folder))
        say(f"  {variant}: {took:.1f} ms a picture")
    if not passed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in results.items())
        raise ArchiveError(f"{reasons}; take --engine auto, which includes the reference")
    return min(passed)[1], results


def _seconds_a_picture(folder: Path, pictures: Pictures) -> float:
    """Return the median seconds of a forward pass a picture: batches of eight, one thread, a worker's device here."""
    forward = engines.load(folder, ModelSpec.load(folder), threads=1).forward
    batch = pictures.judged[:_BATCH]
    forward(batch)
    took = []
    for _ in range(_SAMPLES):
        start = time.perf_counter()
        forward(batch)
        took.append(time.perf_counter() - start)
    return statistics.median(took) / len(batch)


def _with_tolerance(
    folder: Path, spec: ModelSpec, forward: Forward, photometry: Photometry, variant: Variant
) -> ModelSpec:
    """Return the spec with the variant's tolerance, after proving that the goldens still notice mistakes within it.

    The tolerance is half as much again as the goldens move here, since they may move more on another CPU. What the
    goldens notice through this engine is recorded with them.

    Raises:
        ArchiveError: when the tolerance would be too large, or hide a mistake that a conversion can make.
    """
    path = folder / GOLDEN / EXPECTED
    record = json.loads(path.read_text(encoding="utf-8"))
    data = [(folder / GOLDEN / str(entry["file"])).read_bytes() for entry in record["pictures"]]
    replay(folder, spec, forward)
    rows = probabilities(forward(np.stack([pixels.decode(each, spec.geometry) for each in data])), spec.output)
    moved = max(
        abs(float(row[spec.labels.index(label)]) - float(value))
        for row, entry in zip(rows, record["pictures"], strict=True)
        for label, value in entry["top"]
    )
    tolerance = max(ModelSpec.tolerance, math.ceil(100 * _MARGIN * moved) / 100)
    if tolerance > _MOST_TOLERANCE:
        raise ArchiveError(
            f"{variant} is refused: a golden picture's probability moves by {moved:.3f}; take a higher precision"
        )
    spec = dataclasses.replace(spec, tolerance=tolerance)
    seen = mistakes.noticed(folder, spec, forward, data, photometry)
    lost = [name for name in mistakes.OF_THE_MODEL if name in record["detects"] and seen.get(name) is False]
    if lost:
        raise ArchiveError(
            f"{variant} is refused: within its tolerance of {tolerance:g} the golden pictures would not notice "
            f"{mistakes.MISTAKES[lost[0]]}; take a higher precision"
        )
    record["detects"] = [name for name in record["detects"] if seen.get(name)]
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return spec
