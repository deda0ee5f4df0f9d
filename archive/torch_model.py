"""The PyTorch model of an exported folder: its module, and the normalisation inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from archive.mistakes import Photometry
from beeline.spec import ModelSpec


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
