"""The exported model in PyTorch: its module and normalisation, and the same file for another precision or compiler."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from archive.goldens.mistakes import Photometry
from archive.variants.agreement import Gate, Pictures
from beeline.errors import ArchiveError
from beeline.spec import Artifact, ModelSpec

PACKAGES = {"bf16": ("torch",), "fp16": ("torch",)}
COMPILED_PACKAGES = {"fp32": ("torch",), "bf16": ("torch",), "fp16": ("torch",)}


def convert(folder: Path, spec: ModelSpec, out: Path, precision: str, pictures: Pictures, gate: Gate) -> Artifact:
    """Copy the model into `out`: what the worker computes in is said by the spec alone.

    Args:
        folder: of the export, with the fp32 model.
        spec: of it.
        out: an existing folder.
        precision: one of `PACKAGES`.
        pictures: not looked at.
        gate: not looked at.
    """
    for name in spec.model.digests:
        shutil.copyfile(folder / name, out / name)
    return spec.model


def convert_for_compiler(
    folder: Path, spec: ModelSpec, out: Path, precision: str, pictures: Pictures, gate: Gate
) -> Artifact:
    """Copy the model into `out`; see `convert`.

    Raises:
        ArchiveError: for TorchScript, which `torch.compile` does not look into.
    """
    if spec.model.format != "exported_program":
        raise ArchiveError(
            f"{spec.model.file} is {spec.model.format}, which torch.compile cannot read; take --engine torch, or bring "
            "the model as an exported program"
        )
    return convert(folder, spec, out, precision, pictures, gate)


def module(folder: Path, spec: ModelSpec) -> Any:
    """Return the model as a callable module: uint8 `[N, crop, crop, 3]` to `[N, classes]`."""
    import torch

    path = folder / spec.model.file
    if spec.model.format == "torchscript":
        return torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    return torch.export.load(path)


def photometry(folder: Path, spec: ModelSpec) -> Photometry:
    """Return the mean and the deviation that the graph normalises with, per RGB channel, of values of 0..1.

    They are in the buffers that `archive.graph.Uint8Input` adds; of a network that takes uint8 by itself nobody knows
    them, and mean 0 and deviation 1 stand for that.
    """
    made = module(folder, spec)
    state = made.state_dict() if callable(made.state_dict) else made.state_dict
    buffers = dict(state)
    if "scale" not in buffers or "shift" not in buffers:
        return ((0.0,) * 3, (1.0,) * 3)
    deviation = [1 / (255 * float(value)) for value in buffers["scale"].flatten()[:3]]
    mean = [-float(value) * std for value, std in zip(buffers["shift"].flatten()[:3], deviation, strict=True)]
    return (mean, deviation)
