"""A fast variant of an exported folder: another engine or precision, proved to answer as the fp32 reference does."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from archive import agreement, mistakes, to_openvino
from archive.agreement import Gate, Pictures
from archive.mistakes import Photometry
from beeline import engine, pixels
from beeline.answer import probabilities
from beeline.errors import ArchiveError, ConfigError
from beeline.golden import EXPECTED, FOLDER, Forward, replay
from beeline.spec import FILE_NAME, Artifact, ModelSpec

Say = Callable[[str], None]
Convert = Callable[[Path, ModelSpec, Path, str, Pictures, float], Artifact]
CONVERTERS: dict[str, tuple[Convert, tuple[str, ...]]] = {"openvino": (to_openvino.convert, to_openvino.PRECISIONS)}
# Goldens that move by more would let a real mistake pass.
_MOST_TOLERANCE = 0.15
_MARGIN = 1.5
_BATCH, _SAMPLES = 8, 7


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


def known() -> list[Wanted]:
    """Return every variant that can be made, the reference first."""
    return [
        Wanted("torch", "fp32"),
        *(Wanted(name, precision) for name, (_, precisions) in CONVERTERS.items() for precision in precisions),
    ]


def make(export: Path, out: Path, wanted: Wanted, pictures: Pictures, gate: Gate, photometry: Photometry) -> ModelSpec:
    """Write a variant of an exported folder into `out`, an empty folder, and return its spec.

    Args:
        export: with the fp32 model for PyTorch and its golden pictures.
        out: where the variant goes.
        wanted: engine and precision.
        pictures: of the model's geometry.
        gate: what it has to keep.
        photometry: of the model's normalisation, to prove that the goldens still notice its absence.

    Raises:
        ArchiveError: when it is too far from the reference, on the pictures or on the goldens.
        ConfigError: where the engine's packages are not installed.
    """
    spec = ModelSpec.load(export)
    if (spec.engine, spec.precision) != ("torch", "fp32"):
        raise ArchiveError(f"{export} is {spec.engine} {spec.precision} already; variants are made of the fp32 export")
    convert, _ = CONVERTERS[wanted.engine]
    artifact = convert(export, spec, out, wanted.precision, pictures, gate.top1)
    made = dataclasses.replace(spec, model=artifact, engine=wanted.engine, precision=wanted.precision, tolerance=0.5)
    forward = engine.load(out, made, device="cpu").forward
    reference = engine.load(export, spec, device="cpu").forward
    expected = agreement.scores(reference, pictures.judged, spec.output)
    found = agreement.measure(expected, agreement.scores(forward, pictures.judged, spec.output), pictures.source)
    agreement.check(found, gate, str(wanted))
    shutil.copytree(export / FOLDER, out / FOLDER)
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
    """
    tried, folders = [], {}
    for wanted in among:
        folder = export
        try:
            if (wanted.engine, wanted.precision) != ("torch", "fp32"):
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
    best = min((each for each in tried if each.milliseconds is not None), key=lambda each: each.milliseconds or 0.0)
    return folders[best.wanted], tried


def seconds_a_picture(folder: Path, spec: ModelSpec, pictures: Pictures) -> float:
    """Return the median seconds of a forward pass a picture: batches of eight, one thread."""
    forward = engine.load(folder, spec, device="cpu", threads=1).forward
    batch = pictures.judged[:_BATCH]
    forward(batch)
    took = []
    for _ in range(_SAMPLES):
        start = time.perf_counter()
        forward(batch)
        took.append(time.perf_counter() - start)
    return statistics.median(took) / len(batch)


def _goldens(folder: Path) -> tuple[list[bytes], list[list[tuple[str, float]]], list[str]]:
    record = json.loads((folder / FOLDER / EXPECTED).read_text(encoding="utf-8"))
    data = [(folder / FOLDER / str(entry["file"])).read_bytes() for entry in record["pictures"]]
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
    path = folder / FOLDER / EXPECTED
    record = json.loads(path.read_text(encoding="utf-8"))
    record["detects"] = [name for name in record["detects"] if seen.get(name)]
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
