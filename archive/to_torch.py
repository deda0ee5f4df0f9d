"""An exported model for PyTorch in another precision, or for PyTorch's compiler: the very same file."""

from __future__ import annotations

import shutil
from pathlib import Path

from archive.agreement import Gate, Pictures
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
