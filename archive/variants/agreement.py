"""How far a fast variant's answers are from those of the fp32 reference, and the gate that refuses a variant."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from beeline import pixels
from beeline.classification import probabilities
from beeline.errors import ArchiveError, ConfigError, RequestError
from beeline.golden import Forward
from beeline.settings import parsed_device
from beeline.spec import Agreement, Geometry

# One picture of 50 is 2 %; fewer pictures say too little.
LEAST_PICTURES = 50
# At most so many pictures judge, and so many calibrate.
_MOST_PICTURES = 500
_BATCH = 16


@dataclass(frozen=True)
class Gate:
    """The limits for a variant.

    `top1` is the least part of pictures with the reference's first label. `moved` is how far a probability may move on
    99 of 100 pictures.
    """

    top1: float = 0.99
    moved: float = 0.10

    def __post_init__(self) -> None:
        if not 0 < self.top1 <= 1:
            raise ConfigError(f"--agreement is {self.top1:g}; allowed: over 0, at most 1, such as 0.99")
        if not 0 <= self.moved <= 1:
            raise ConfigError(f"--moved is {self.moved:g}; allowed: 0 to 1, such as 0.1")

    def slack(self, same: NDArray[np.bool_], moved: NDArray[np.float64]) -> float:
        """Return the part of the pictures that may still fail before the variant fails; negative if it fails already.

        `same` is whether each picture keeps its first label, `moved` how far its probabilities move at most.
        """
        within = float((moved <= self.moved).mean()) - _least(len(moved)) / len(moved)
        return min(float(same.mean()) - self.top1, within)


@dataclass(frozen=True)
class Pictures:
    """Decoded pictures, uint8 `[N, crop, crop, 3]`: some to calibrate with, others to judge by.

    `judged` are decoded in full, as the reference gets them. `served` are the same pictures as a worker decodes them.
    """

    calibration: NDArray[np.uint8]
    judged: NDArray[np.uint8]
    served: NDArray[np.uint8]
    geometry: Geometry
    source: str


def read(judged: Path, calibration: Path | None, geometry: Geometry, calibrates: bool = True) -> Pictures:
    """Decode the pictures of one folder or two, so that no picture is in both parts.

    Args:
        judged: a folder of pictures, at any depth. Without `calibration` their digests split it in two.
        calibration: a folder of pictures to calibrate with. Pictures that are also in `judged` do not calibrate.
        geometry: of the model, as it will be served.
        calibrates: whether anything will be calibrated. If not, all pictures judge.

    Raise `ArchiveError` when a folder is missing or holds too few pictures.
    """
    bodies, others = _by_digest(judged), {}
    if calibrates and calibration is not None:
        others = {digest: body for digest, body in _by_digest(calibration).items() if digest not in bodies}
    elif calibrates:
        # By the last digit, since the first ones give the order.
        others = {digest: body for digest, body in bodies.items() if int(digest[-1], 16) % 2}
        bodies = {digest: body for digest, body in bodies.items() if digest not in others}
    full = dataclasses.replace(geometry, decoding="full")
    calibrating, judging = _decoded(others, full, full), _decoded(bodies, full, geometry)
    if len(judging) < LEAST_PICTURES or (calibrates and len(calibrating) < LEAST_PICTURES):
        count, fix = f"{len(judging)} pictures to judge by", "name a larger folder with --pictures"
        if geometry != full:
            size = f" of at least twice {geometry.resize} pixels" if geometry.decoding == "scaled" else ""
            count += f" that {geometry.decoding} decoding changes"
            fix = f"name a folder with more JPEGs{size} with --pictures, or take --decoding full"
        if calibrates:
            count += f" and {len(calibrating)} to calibrate with"
            fix += ", or another one to calibrate with by --calibration"
        folders = judged if calibration is None else f"{judged} and {calibration}"
        each = " of each" if calibrates else ""
        raise ArchiveError(f"there are {count} in {folders}; at least {LEAST_PICTURES}{each} are needed: {fix}")
    crops, served = (np.stack(part) for part in zip(*judging, strict=True))
    calibrated = np.stack([crop for crop, _ in calibrating]) if calibrating else crops[:0]
    return Pictures(calibrated, crops, served, geometry, judged.resolve().name)


def some(paths: Sequence[Path], source: str, geometry: Geometry) -> Pictures | None:
    """Decode `LEAST_PICTURES` of these files, at even distances, all to judge by; None if none can be decoded."""
    crops = []
    for path in paths[:: max(1, len(paths) // LEAST_PICTURES)][:LEAST_PICTURES]:
        with suppress(RequestError, OSError):
            crops.append(pixels.decode(path.read_bytes(), geometry))
    return Pictures(np.stack(crops)[:0], np.stack(crops), np.stack(crops), geometry, source) if crops else None


def _by_digest(folder: Path) -> dict[str, bytes]:
    if not folder.is_dir():
        raise ArchiveError(f"the folder of pictures {folder} is missing; name another")
    bodies = (path.read_bytes() for path in folder.rglob("*") if path.is_file())
    return {hashlib.sha256(body).hexdigest(): body for body in bodies}


def _decoder(geometry: Geometry) -> Callable[[bytes], NDArray[np.uint8]]:
    """Return a function that decodes a picture like a worker on this machine."""
    if geometry.decoding != "cuda":
        return lambda body: pixels.decode(body, geometry)
    import torch

    from beeline.cuda_jpeg import CudaJpegs

    name, index = parsed_device(os.environ.get("BEELINE_DEVICE") or "auto")
    if name == "cpu" or not torch.cuda.is_available():
        why = "--decoding is 'cuda', and there is no CUDA device to judge it by"
        raise ConfigError(f"{why}; build the archive where there is one, or take full or scaled")
    jpegs = CudaJpegs(torch.device(f"cuda:{index or 0}"), geometry)

    def decode(body: bytes) -> NDArray[np.uint8]:
        (crop,) = jpegs.decode([body])
        return pixels.decode(body, geometry) if crop is None else crop

    return decode


def _decoded(
    bodies: Mapping[str, bytes], full: Geometry, geometry: Geometry
) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Decode pictures in full and as they will be served, in the order of their digests.

    If decoding differs, only pictures whose pixels differ are kept: the others say nothing about it.
    """
    reference, serving = _decoder(full), _decoder(geometry)
    pairs: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]] = []
    for digest in sorted(bodies):
        if len(pairs) == _MOST_PICTURES:
            break
        try:
            crop = reference(bodies[digest])
            served = crop if geometry == full else serving(bodies[digest])
        except RequestError:
            # The folder may hold notes and labels too, and a worker refuses a broken picture.
            continue
        if geometry == full or not np.array_equal(crop, served):
            pairs.append((crop, served))
    return pairs


def scores(forward: Forward, crops: NDArray[np.uint8], output: str) -> NDArray[np.float64]:
    """Return the probabilities `[N, classes]` of uint8 crops `[N, crop, crop, 3]`; `output` is as in the spec."""
    parts = [forward(crops[start : start + _BATCH]) for start in range(0, len(crops), _BATCH)]
    return probabilities(np.concatenate(parts), output)


def same_first(reference: NDArray[np.float64], variant: NDArray[np.float64], output: str) -> NDArray[np.bool_]:
    """Return for each row whether the first label is the reference's.

    Of scores, several labels may hold and be equally sure: any label that the reference gives over a half may be first.
    """
    first = variant.argmax(axis=1)
    same: NDArray[np.bool_] = reference.argmax(axis=1) == first
    return same | (reference[np.arange(len(first)), first] > 0.5) if output == "scores" else same


def measure(
    reference: NDArray[np.float64], variant: NDArray[np.float64], source: str, output: str = "logits"
) -> Agreement:
    """Compare probabilities, `[N, classes]` each. Numbers that are not finite agree with nothing."""
    moved = np.abs(reference - variant).max(axis=1)
    moved = np.where(np.isfinite(moved), moved, 1.0)
    return summary(same_first(reference, variant, output) & np.isfinite(variant).all(axis=1), moved, source)


def summary(same: NDArray[np.bool_], moved: NDArray[np.float64], source: str) -> Agreement:
    """Return the agreement of pictures whose answer is the `same` or not, and has `moved` so far."""
    within = np.sort(moved)[_least(len(moved)) - 1]
    return Agreement(
        round(float(same.mean()), 5), round(float(moved.max()), 4), round(float(within), 4), len(moved), source
    )


def _least(count: int) -> int:
    """Return how many of `count` pictures must keep the limit on probabilities: 99 of 100."""
    return int(np.ceil(0.99 * count))


def check(agreement: Agreement, gate: Gate, variant: str, answers: str = "first labels") -> None:
    """Raise `ArchiveError` for a variant that is too far from the reference; it says by how much.

    `answers` names what has to be the same.
    """
    reasons, off = [], agreement.moved_99
    if agreement.top1 < gate.top1:
        fewer = f"{gate.top1 - agreement.top1:.1%} fewer than the required {gate.top1:.1%}"
        reasons.append(f"{agreement.top1:.1%} of the {answers} are the fp32 reference's, {fewer}")
    if off > gate.moved:
        reasons.append(f"on one of 100 pictures a probability moves by {off:.3f} or more, {gate.moved:.3f} are allowed")
    if reasons:
        why = f"{'; '.join(reasons)} ({agreement.pictures} pictures of {agreement.data})"
        fix = "take a higher precision, or allow it with --agreement and --moved"
        raise ArchiveError(f"{variant} is refused: {why}; {fix}")
