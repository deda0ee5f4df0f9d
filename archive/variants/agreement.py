"""How far a fast variant's answers are from the fp32 reference's, and whether that is near enough."""

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

# Fewer say too little: of 50 pictures one that differs is 2 %.
LEAST_PICTURES = 50
_BATCH = 16
Decode = Callable[[bytes], NDArray[np.uint8]]


@dataclass(frozen=True)
class Gate:
    """What a variant has to keep: the part of equal first labels, and probabilities, on 99 of 100 pictures."""

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
        """Return how much worse a variant may still become, as a part of the pictures; under 0 it does not pass.

        The smaller one of two: of the pictures that lose their label, and of those that move too far.

        Args:
            same: of each picture, whether its first label is kept.
            moved: of each picture, how far a probability moves at most.
        """
        return min(
            float(same.mean()) - self.top1, float((moved <= self.moved).mean()) - _least(len(moved)) / len(moved)
        )


@dataclass(frozen=True)
class Pictures:
    """Decoded pictures, uint8 `[N, crop, crop, 3]`: some to calibrate with, others to judge by; none is in both.

    `judged` are decoded in full, as the reference sees them, and `served` the same ones as a worker will decode them.
    """

    calibration: NDArray[np.uint8]
    judged: NDArray[np.uint8]
    served: NDArray[np.uint8]
    geometry: Geometry
    source: str


def read(
    judged: Path, calibration: Path | None, geometry: Geometry, calibrates: bool = True, most: int = 500
) -> Pictures:
    """Decode the pictures of one folder or two, so that no file, whatever its name, is in both parts.

    Args:
        judged: a folder of pictures, at any depth. Without `calibration` it is split in two by digests.
        calibration: a folder of pictures to calibrate with; what is in `judged` too is only judged by.
        geometry: of the model, as it will be served.
        calibrates: whether anything will be calibrated; where nothing is, all pictures judge.
        most: pictures of each part at most, the first ones by their digests.

    Raises:
        ArchiveError: when a folder is missing, or there are too few.
    """
    mine, other = _by_digest(judged), {}
    if calibrates and calibration is None:
        # The last digit decides, the first ones give the order.
        other = {digest: data for digest, data in mine.items() if int(digest[-1], 16) % 2}
        mine = {digest: data for digest, data in mine.items() if digest not in other}
    elif calibrates and calibration is not None:
        other = {digest: data for digest, data in _by_digest(calibration).items() if digest not in mine}
    full = dataclasses.replace(geometry, decoding="full")
    reference = _decoder(full)
    calibrating, judging = _decoded(other, reference, most), _decoded(mine, reference, most)
    if min(len(judging), len(calibrating) if calibrates else LEAST_PICTURES) < LEAST_PICTURES:
        folders = judged if calibration is None else f"{calibration} and {judged}"
        raise ArchiveError(
            f"there are {len(calibrating)} pictures to calibrate with and {len(judging)} to judge by in {folders}; at "
            f"least {LEAST_PICTURES} of each are needed: name a larger folder with --pictures, or another one to "
            "calibrate with by --calibration"
            if calibrates
            else f"there are {len(judging)} pictures to judge by in {judged}; at least {LEAST_PICTURES} are needed: "
            "name a larger folder with --pictures"
        )
    crops = np.stack(judging)
    served = crops
    if geometry != full:
        crops, served = _differing(mine, geometry, most, judged)
    return Pictures(np.stack(calibrating) if calibrating else crops[:0], crops, served, geometry, judged.resolve().name)


def _differing(
    bodies: Mapping[str, bytes], geometry: Geometry, most: int, folder: Path
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Decode in both ways, and keep the pictures that differ: the others say nothing of the difference."""
    reference, serving = _decoder(dataclasses.replace(geometry, decoding="full")), _decoder(geometry)
    pairs = []
    for digest in sorted(bodies):
        one = {digest: bodies[digest]}
        both = _decoded(one, reference, 1), _decoded(one, serving, 1)
        if all(both) and not np.array_equal(both[0][0], both[1][0]):
            pairs.append((both[0][0], both[1][0]))
        if len(pairs) == most:
            break
    if len(pairs) < LEAST_PICTURES:
        which = f"of at least twice {geometry.resize} pixels, which" if geometry.decoding == "scaled" else "that"
        raise ArchiveError(
            f"of the pictures to judge by in {folder} {len(pairs)} are JPEGs {which} {geometry.decoding} decoding is "
            f"for; at least {LEAST_PICTURES} are needed: name such photographs with --pictures, or take --decoding full"
        )
    return np.stack([pair[0] for pair in pairs]), np.stack([pair[1] for pair in pairs])


def _by_digest(folder: Path) -> dict[str, bytes]:
    if not folder.is_dir():
        raise ArchiveError(f"the folder of pictures {folder} is missing")
    bodies = (path.read_bytes() for path in folder.rglob("*") if path.is_file())
    return {hashlib.sha256(body).hexdigest(): body for body in bodies}


def _decoder(geometry: Geometry) -> Decode:
    """Return what decodes as a worker on this machine would.

    Raises:
        ConfigError: for decoding on a CUDA device where none is, so that nothing can be judged.
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


def _decoded(bodies: Mapping[str, bytes], decode: Decode, most: int) -> list[NDArray[np.uint8]]:
    found: list[NDArray[np.uint8]] = []
    for digest in sorted(bodies):
        if len(found) == most:
            break
        try:
            found.append(decode(bodies[digest]))
        except RequestError:
            # Notes and labels lie among pictures, and a broken one could not be served either.
            continue
    return found


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
    """Return how many of so many pictures have to stay within what a probability may move by: 99 of 100."""
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
