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
from archive.variants import agreement, to_onnx, to_openvino, to_torch
from archive.variants.agreement import Gate, Pictures
from beeline import engines, pixels
from beeline.answer import probabilities
from beeline.errors import ArchiveError, ConfigError, did_you_mean
from beeline.golden import Forward, replay
from beeline.spec import DECODINGS, EXPECTED, FILE_NAME, GOLDEN, Artifact, ModelSpec

Say = Callable[[str], None]
Convert = Callable[[Path, ModelSpec, Path, str, Pictures, Gate], Artifact]
# Goldens that move by more would let a real mistake pass.
_MOST_TOLERANCE = 0.15
_MARGIN = 1.5
_BATCH, _SAMPLES = 8, 7


@dataclass(frozen=True)
class Converter:
    """What makes the artifact of one engine, and by precision the packages that it needs for that."""

    convert: Convert
    packages: Mapping[str, tuple[str, ...]]


CONVERTERS = {
    "torch": Converter(to_torch.convert, to_torch.PACKAGES),
    "torch_compile": Converter(to_torch.convert_for_compiler, to_torch.COMPILED_PACKAGES),
    "openvino": Converter(to_openvino.convert, to_openvino.PACKAGES),
    "onnxruntime": Converter(to_onnx.convert, to_onnx.PACKAGES),
}


@dataclass(frozen=True)
class Wanted:
    """One variant: its engine and precision."""

    engine: str
    precision: str

    def __str__(self) -> str:
        """Return it as a card says it."""
        return f"{self.engine} {self.precision}"


@dataclass(frozen=True)
class Tried:
    """What became of a variant: milliseconds a picture in batches of eight on one thread, or why it was refused."""

    wanted: Wanted
    milliseconds: float | None
    refused: str | None = None


REFERENCE = Wanted("torch", "fp32")


def known() -> list[Wanted]:
    """Return every variant that can be made, the reference first."""
    return [
        REFERENCE,
        *(Wanted(name, precision) for name, made in CONVERTERS.items() for precision in made.packages),
    ]


def left_out(wanted: Wanted, decoding: str = "full") -> str | None:
    """Return why a variant can be neither made nor timed on this machine; None where it can."""
    if decoding == "cuda" and wanted.engine in engines.ON_CPUS:
        return f"JPEGs are to be decoded on a CUDA device, and {wanted.engine} runs on CPUs"
    needed = [engines.runtime(wanted.engine)]
    if wanted != REFERENCE:
        needed += CONVERTERS[wanted.engine].packages[wanted.precision]
    absent = [name for name in dict.fromkeys(needed) if importlib.util.find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed here"
    if wanted.engine == "torch_compile":
        from beeline.engines.torch_compile import check_compiler

        try:
            check_compiler(os.environ)
        except ConfigError as error:
            return str(error)
    if wanted.precision in ("fp16", "bf16"):
        import torch

        if wanted.engine.startswith("torch") and torch.cuda.is_available():
            return None
        if wanted.precision == "fp16":
            return "fp16 is for CUDA devices, and none is there"
        if not torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported():
            # PyTorch takes 473 ms for a ResNet-18 so, 64 in fp32; OpenVINO computes in fp32, and what it will do
            # where there is bf16 would be judged by nothing.
            return "this processor cannot multiply in bf16"
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
    """Return the folder to build of, and for `auto` what each variant took or why it was refused.

    Args:
        export: of the fp32 model for PyTorch.
        scratch: a folder for variants.
        asked: engine and precision, each perhaps `auto`.
        pictures: to judge by, and to calibrate with.
        gate: the part of equal first labels, and how far probabilities may move on 99 of 100 pictures.
        decoding: `full`, `scaled` for JPEGs at a part of their size, or `cuda` for JPEGs on the model's device.
        say: takes each line of progress.

    Raises:
        ConfigError: for what is not known, or without pictures.
        ArchiveError: when the gate refuses it.
    """
    engine, precision = asked
    choices = known()
    for word, option, names in (
        (engine, "--engine", {each.engine for each in choices}),
        (precision, "--precision", {each.precision for each in choices}),
    ):
        if word not in (None, "auto", *names):
            raise ConfigError(f"{option} is {word!r}{did_you_mean(str(word), ('auto', *sorted(names)))}")
    wanted = [
        each
        for each in choices
        if engine in ("auto", each.engine)
        and (precision or ("auto" if engine == "auto" else "fp32")) in ("auto", each.precision)
    ]
    if decoding == "cuda" and engine in engines.ON_CPUS:
        raise ConfigError(f"--decoding is 'cuda', and {engine} runs on CPUs; take full or scaled, or --engine torch")
    if not wanted:
        both = ", ".join(map(str, choices))
        raise ConfigError(f"there is no {engine} {precision} here; allowed: {both}")
    spec = ModelSpec.load(export)
    if decoding not in DECODINGS:
        raise ConfigError(f"--decoding is {decoding!r}{did_you_mean(decoding, DECODINGS)}")
    geometry = dataclasses.replace(spec.geometry, decoding=decoding)
    if wanted == [REFERENCE] and geometry == spec.geometry:
        if pictures != (None, None):
            raise ConfigError(
                "--pictures and --calibration are for a fast variant, and this is the fp32 reference: add --engine, "
                "--precision or --decoding, or leave them out"
            )
        return export, None
    judged, calibration = pictures
    if judged is None:
        raise ConfigError("a variant is judged by pictures; name a folder of photographs with --pictures")
    # A lone one that cannot be made here says so itself.
    tried = [each for each in wanted if len(wanted) == 1 or left_out(each, decoding) is None]
    calibrates = any(each.precision == "int8" for each in tried)
    if calibration is not None and all(each.precision != "int8" for each in wanted):
        raise ConfigError(
            f"--calibration is {calibration}, and only int8 is calibrated; leave it out: --pictures judge, or add "
            "--precision int8"
        )
    read = agreement.read(judged, calibration, geometry, calibrates)
    photometry = to_torch.photometry(export, spec)
    allowed = agreement.Gate(*gate)
    if len(wanted) == 1:
        folder = scratch / "variant"
        folder.mkdir()
        say(f"making {wanted[0]} and comparing it with fp32 on {len(read.judged)} pictures ...")
        make(export, folder, wanted[0], read, allowed, photometry)
        return folder, None
    say(f"trying {len(wanted)} variants on {len(read.judged)} pictures ...")
    folder, results = fastest(export, scratch, read, allowed, photometry, wanted, say)
    return folder, {
        str(each.wanted): each.refused or "" if each.milliseconds is None else each.milliseconds for each in results
    }


def make(export: Path, out: Path, wanted: Wanted, pictures: Pictures, gate: Gate, photometry: Photometry) -> ModelSpec:
    """Write a variant of an exported folder into `out`, an empty folder, and return its spec.

    Args:
        export: with the fp32 model for PyTorch and its golden pictures.
        out: where the variant goes.
        wanted: engine and precision.
        pictures: of the model's geometry, decoded as the variant is to decode.
        gate: what it has to keep.
        photometry: of the model's normalisation, to prove that the goldens still notice its absence.

    Raises:
        ArchiveError: when it is too far from the reference, on the pictures or on the goldens.
        ConfigError: where the engine's packages are not installed.
    """
    spec = ModelSpec.load(export)
    if Wanted(spec.engine, spec.precision) != REFERENCE:
        raise ArchiveError(f"{export} is {spec.engine} {spec.precision} already; variants are made of the fp32 export")
    artifact = CONVERTERS[wanted.engine].convert(export, spec, out, wanted.precision, pictures, gate)
    made = dataclasses.replace(
        spec,
        model=artifact,
        geometry=pictures.geometry,
        engine=wanted.engine,
        precision=wanted.precision,
        tolerance=0.5,
    )
    # On the device that a worker here would take; some precisions are for one kind alone.
    forward = engines.load(out, made).forward
    reference = engines.load(export, spec, device="cpu").forward
    expected = agreement.scores(reference, pictures.judged, spec.output)
    found = agreement.measure(expected, agreement.scores(forward, pictures.served, spec.output), pictures.source)
    agreement.check(found, gate, str(wanted))
    shutil.copytree(export / GOLDEN, out / GOLDEN)
    made = dataclasses.replace(made, agreement=found, tolerance=_tolerance(out, made, forward, wanted))
    _still_noticed(out, made, forward, photometry, wanted)
    made.save(out / FILE_NAME)
    return made


def fastest(
    export: Path,
    scratch: Path,
    pictures: Pictures,
    gate: Gate,
    photometry: Photometry,
    among: Sequence[Wanted],
    say: Say,
) -> tuple[Path, list[Tried]]:
    """Make and time every variant; return the folder of the fastest that the gate lets through, and all that was tried.

    Args:
        export: the fp32 export, which is tried too.
        scratch: a folder for the variants.
        pictures: see `make`.
        gate: see `make`.
        photometry: see `make`.
        among: what to try.
        say: takes each line of progress.

    Raises:
        ArchiveError: when none is let through.
    """
    tried, folders = [], {}
    for wanted in among:
        folder = export
        why = left_out(wanted, pictures.geometry.decoding)
        if why is not None:
            tried.append(Tried(wanted, None, f"left out: {why}"))
            say(f"  {wanted} is left out: {why}")
            continue
        try:
            if wanted != REFERENCE or pictures.geometry != ModelSpec.load(export).geometry:
                folder = scratch / f"{wanted.engine}-{wanted.precision}"
                folder.mkdir()
                make(export, folder, wanted, pictures, gate, photometry)
            took = 1000 * seconds_a_picture(folder, ModelSpec.load(folder), pictures)
        except (ArchiveError, ConfigError) as error:
            tried.append(Tried(wanted, None, str(error)))
            say(f"  {wanted}: {error}")
            continue
        tried.append(Tried(wanted, round(took, 2)))
        folders[wanted] = folder
        say(f"  {wanted}: {took:.1f} ms a picture")
    timed = [(each.milliseconds, each.wanted) for each in tried if each.milliseconds is not None]
    if not timed:
        raise ArchiveError(
            "; ".join(f"{each.wanted}: {each.refused}" for each in tried)
            + "; take --engine auto, which has the reference"
        )
    return folders[min(timed, key=lambda each: each[0])[1]], tried


def seconds_a_picture(folder: Path, spec: ModelSpec, pictures: Pictures) -> float:
    """Return the median seconds of a forward pass a picture: batches of eight, one thread, a worker's device here."""
    forward = engines.load(folder, spec, threads=1).forward
    batch = pictures.judged[:_BATCH]
    forward(batch)
    took = []
    for _ in range(_SAMPLES):
        start = time.perf_counter()
        forward(batch)
        took.append(time.perf_counter() - start)
    return statistics.median(took) / len(batch)


def _goldens(folder: Path) -> tuple[list[bytes], list[list[tuple[str, float]]], list[str]]:
    record = json.loads((folder / GOLDEN / EXPECTED).read_text(encoding="utf-8"))
    data = [(folder / GOLDEN / str(entry["file"])).read_bytes() for entry in record["pictures"]]
    top = [[(str(label), float(value)) for label, value in entry["top"]] for entry in record["pictures"]]
    return data, top, list(record["detects"])


def _tolerance(folder: Path, spec: ModelSpec, forward: Forward, wanted: Wanted) -> float:
    """Return how far the goldens may move: as far as they do here, and half of that again for another CPU."""
    data, top, _ = _goldens(folder)
    replay(folder, spec, forward)
    rows = probabilities(forward(np.stack([pixels.decode(each, spec.geometry) for each in data])), spec.output)
    moved = max(
        abs(float(row[spec.labels.index(label)]) - value)
        for row, wanted_top in zip(rows, top, strict=True)
        for label, value in wanted_top
    )
    tolerance = max(ModelSpec.tolerance, math.ceil(100 * _MARGIN * moved) / 100)
    if tolerance > _MOST_TOLERANCE:
        raise ArchiveError(
            f"{wanted} is refused: a golden picture's probability moves by {moved:.3f}; take a higher precision"
        )
    return tolerance


def _still_noticed(folder: Path, spec: ModelSpec, forward: Forward, photometry: Photometry, wanted: Wanted) -> None:
    """Prove that the goldens notice through this engine, within its tolerance, what a conversion can get wrong."""
    data, _, before = _goldens(folder)
    seen = mistakes.noticed(folder, spec, forward, data, photometry)
    lost = [name for name in mistakes.OF_THE_MODEL if name in before and seen.get(name) is False]
    if lost:
        raise ArchiveError(
            f"{wanted} is refused: within its tolerance of {spec.tolerance:g} the golden pictures would not notice "
            f"{mistakes.MISTAKES[lost[0]]}; take a higher precision"
        )
    path = folder / GOLDEN / EXPECTED
    record = json.loads(path.read_text(encoding="utf-8"))
    record["detects"] = [name for name in record["detects"] if seen.get(name)]
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
