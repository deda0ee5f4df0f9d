"""How far a fast variant's answers are from the fp32 reference's, and the gate that refuses what is too far."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from beeline import pixels
from beeline.answer import probabilities
from beeline.errors import ArchiveError, ConfigError, RequestError
from beeline.golden import Forward
from beeline.settings import parsed_device
from beeline.spec import Agreement, Geometry

# Of 50 pictures one that differs is 2 %; fewer say too little.
LEAST_PICTURES = 50
_BATCH = 16
Decode = Callable[[bytes], NDArray[np.uint8]]


@dataclass(frozen=True)
class Gate:
    """The limits of a variant: the least part of equal first labels, and how far a probability may move.

    The second limit holds for 99 of 100 pictures.
    """

    top1: float = 0.99
    moved: float = 0.10

    def __post_init__(self) -> None:
        """Check the numbers; a percentage is not a part.

        Raises:
            ConfigError: naming the one that is impossible.
        """
        if not 0 < self.top1 <= 1:
            raise ConfigError(f"--agreement is {self.top1:g}; allowed: over 0, at most 1, such as 0.99")
        if not 0 <= self.moved <= 1:
            raise ConfigError(f"--moved is {self.moved:g}; allowed: 0 to 1, such as 0.1")

    def slack(self, same: NDArray[np.bool_], moved: NDArray[np.float64]) -> float:
        """Return the part of the pictures that may still fail before the variant does; under 0 it does not pass.

        A picture fails when it loses its label or moves too far; the tighter of the two limits counts.

        Args:
            same: whether each picture keeps its first label.
            moved: how far each picture's probabilities move at most.
        """
        return min(
            float(same.mean()) - self.top1, float((moved <= self.moved).mean()) - _least(len(moved)) / len(moved)
        )


@dataclass(frozen=True)
class Pictures:
    """Decoded pictures, uint8 `[N, crop, crop, 3]`: some to calibrate with, others to judge by.

    `judged` are decoded in full, as the reference sees them; `served` are the same pictures as a worker decodes them.
    """

    calibration: NDArray[np.uint8]
    judged: NDArray[np.uint8]
    served: NDArray[np.uint8]
    geometry: Geometry
    source: str


def read(
    judged: Path, calibration: Path | None, geometry: Geometry, calibrates: bool = True, most: int = 500
) -> Pictures:
    """Decode the pictures of one folder or two, so that no content is in both parts.

    Args:
        judged: a folder of pictures, at any depth. Without `calibration` it is split in two by digests.
        calibration: a folder of pictures to calibrate with; pictures that are in `judged` too do not calibrate.
        geometry: of the model, as it will be served.
        calibrates: whether anything will be calibrated; else all pictures judge.
        most: pictures of each part at most, the first ones by their digests.

    Raises:
        ArchiveError: when a folder is missing, or there are too few.
    """
    mine, other = _by_digest(judged), {}
    if calibrates and calibration is None:
        # The last digit splits, the first ones give the order.
        other = {digest: data for digest, data in mine.items() if int(digest[-1], 16) % 2}
        mine = {digest: data for digest, data in mine.items() if digest not in other}
    elif calibrates and calibration is not None:
        other = {digest: data for digest, data in _by_digest(calibration).items() if digest not in mine}
    full = dataclasses.replace(geometry, decoding="full")
    calibrating = _decoded(other, most, full, full)
    judging = _decoded(mine, most, full, geometry)
    if geometry != full and len(judging) < LEAST_PICTURES:
        which = f"of at least twice {geometry.resize} pixels, which" if geometry.decoding == "scaled" else "that"
        raise ArchiveError(
            f"of the pictures to judge by in {judged} {len(judging)} are JPEGs {which} {geometry.decoding} decoding is "
            f"for; at least {LEAST_PICTURES} are needed: name such photographs with --pictures, or take --decoding full"
        )
    if len(judging) < LEAST_PICTURES or (calibrates and len(calibrating) < LEAST_PICTURES):
        folders = judged if calibration is None else f"{calibration} and {judged}"
        raise ArchiveError(
            f"there are {len(calibrating)} pictures to calibrate with and {len(judging)} to judge by in {folders}; at "
            f"least {LEAST_PICTURES} of each are needed: name a larger folder with --pictures, or another one to "
            "calibrate with by --calibration"
            if calibrates
            else f"there are {len(judging)} pictures to judge by in {judged}; at least {LEAST_PICTURES} are needed: "
            "name a larger folder with --pictures"
        )
    crops, served = (np.stack(part) for part in zip(*judging, strict=True))
    calibrated = np.stack([crop for crop, _ in calibrating]) if calibrating else crops[:0]
    return Pictures(calibrated, crops, served, geometry, judged.resolve().name)


def _by_digest(folder: Path) -> dict[str, bytes]:
    if not folder.is_dir():
        raise ArchiveError(f"the folder of pictures {folder} is missing")
    bodies = (path.read_bytes() for path in folder.rglob("*") if path.is_file())
    return {hashlib.sha256(body).hexdigest(): body for body in bodies}


def _decoder(geometry: Geometry) -> Decode:
    """Return what decodes as a worker on this machine would.

    Raises:
        ConfigError: for decoding on a CUDA device on a machine without one.
    """
    if geometry.decoding != "cuda":
        return lambda body: pixels.decode(body, geometry)
    import torch

    from beeline.cuda_jpeg import CudaJpegs

    name, index = parsed_device(os.environ.get("BEELINE_DEVICE") or "auto")
    if name == "cpu" or not torch.cuda.is_available():
        raise ConfigError(
            "--decoding is 'cuda', and no CUDA device is there to judge it by; build the archive where one is, or take "
            "full or scaled"
        )
    jpegs = CudaJpegs(torch.device(f"cuda:{index or 0}"), geometry)

    def decode(body: bytes) -> NDArray[np.uint8]:
        (crop,) = jpegs.decode([body])
        return pixels.decode(body, geometry) if crop is None else crop

    return decode


def _decoded(
    bodies: Mapping[str, bytes], most: int, full: Geometry, geometry: Geometry
) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Decode pictures in full and as they will be served, the first ones by their digests.

    Where decoding differs, only pictures whose pixels differ are kept: the others say nothing about it.
    """
    reference, serving = _decoder(full), _decoder(geometry)
    pairs: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]] = []
    for digest in sorted(bodies):
        if len(pairs) == most:
            break
        try:
            crop = reference(bodies[digest])
            served = crop if geometry == full else serving(bodies[digest])
        except RequestError:
            # Notes and labels lie among pictures, and a broken picture could not be served either.
            continue
        if geometry == full or not np.array_equal(crop, served):
            pairs.append((crop, served))
    return pairs


def scores(forward: Forward, crops: NDArray[np.uint8], output: str) -> NDArray[np.float64]:
    """Return the probabilities of pictures, `[N, classes]`.

    Args:
        forward: the model.
        crops: uint8 `[N, crop, crop, 3]`.
        output: what the model returns, as its spec says.
    """
    parts = [forward(crops[start : start + _BATCH]) for start in range(0, len(crops), _BATCH)]
    return probabilities(np.concatenate(parts), output)


def measure(reference: NDArray[np.float64], found: NDArray[np.float64], source: str) -> Agreement:
    """Compare probabilities, `[N, classes]` each.

    A variant whose numbers are not finite agrees on nothing.
    """
    moved = np.abs(reference - found).max(axis=1)
    moved = np.where(np.isfinite(moved), moved, 1.0)
    same = (reference.argmax(axis=1) == found.argmax(axis=1)) & np.isfinite(found).all(axis=1)
    within = np.sort(moved)[_least(len(moved)) - 1]
    return Agreement(
        round(float(same.mean()), 5), round(float(moved.max()), 4), round(float(within), 4), len(moved), source
    )


def _least(count: int) -> int:
    """Return how many of `count` pictures must stay within the limit on probabilities: 99 of 100."""
    return int(np.ceil(0.99 * count))


def check(found: Agreement, gate: Gate, what: str) -> None:
    """Refuse a variant that is too far from the reference.

    Raises:
        ArchiveError: saying by how much.
    """
    wrong = []
    if found.top1 < gate.top1:
        wrong.append(
            f"{found.top1:.1%} of the first labels are the fp32 reference's, {gate.top1 - found.top1:.1%} fewer than "
            f"the {gate.top1:.1%} asked for"
        )
    if found.moved_99 > gate.moved:
        wrong.append(
            f"on one of 100 pictures a probability moves by {found.moved_99:.3f} or more, {gate.moved:.3f} are allowed"
        )
    if wrong:
        raise ArchiveError(
            f"{what} is refused: {'; '.join(wrong)} ({found.pictures} pictures of {found.data}); take a higher "
            "precision, or allow it with --agreement and --moved"
        )
