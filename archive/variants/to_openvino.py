"""An exported model to OpenVINO's format, in fp32, bf16 or int8."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from archive.variants.agreement import Gate, Pictures
from archive.variants.int8 import quantised, without_telemetry
from archive.variants.to_torch import module
from beeline.errors import ArchiveError, ConfigError
from beeline.spec import Artifact, ModelSpec
from host.files import sha256

FILE, WEIGHTS = "model.xml", "model.bin"
PACKAGES = {"fp32": ("openvino",), "bf16": ("openvino",), "int8": ("openvino", "nncf")}


def convert(folder: Path, spec: ModelSpec, out: Path, precision: str, pictures: Pictures, gate: Gate) -> Artifact:
    """Write `model.xml` and `model.bin` into `out` and say what they are.

    bf16 differs from fp32 in how the worker computes, not in the file. In int8 accuracy is controlled: layers are put
    back into fp32, those that cost most agreement first, until enough of the pictures that control keep their answer.

    Args:
        folder: of the export, with the fp32 model.
        spec: of it.
        out: an existing folder.
        precision: one of `PACKAGES`.
        pictures: see `archive.variants.int8.quantised`.
        gate: likewise.

    Raises:
        ArchiveError: for a model that OpenVINO cannot read.
        ConfigError: where OpenVINO or NNCF is not installed, or this processor has no bf16 to judge it in.
    """
    without_telemetry()
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise ConfigError("OpenVINO is not installed here; install the package openvino") from error
    if precision == "bf16" and "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise ConfigError(
            "this processor has no bf16, so OpenVINO would compute in fp32 and nothing would judge bf16; build it on a "
            "machine like the one that serves, or take --precision fp32"
        )
    try:
        with warnings.catch_warnings():
            # Of PyTorch's own code, about PyTorch's own code.
            warnings.simplefilter("ignore")
            model = openvino.convert_model(module(folder, spec), example_input=_example(spec))
        crop = spec.geometry.crop
        model.reshape(openvino.PartialShape([-1, crop, crop, 3]))
        _name(model)
        if precision == "int8":
            model = quantised(model, pictures, gate, spec.output, _compiled, lambda compiled, one: compiled(one)[0])
            _name(model)
        openvino.save_model(model, out / FILE, compress_to_fp16=False)
    except ConfigError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        raise ArchiveError(
            f"{spec.model.file} cannot be converted for OpenVINO ({why}); take --engine torch"
        ) from error
    return Artifact(
        FILE,
        "openvino",
        sha256(out / FILE),
        spec.model.architecture,
        weights=WEIGHTS,
        weights_sha256=sha256(out / WEIGHTS),
    )


def _name(model: Any) -> None:
    """Number the operations: OpenVINO's own names count on from what the process made before."""
    model.set_friendly_name("model")
    for number, operation in enumerate(model.get_ordered_ops()):
        operation.set_friendly_name(f"{operation.get_type_name().lower()}_{number}")


def _example(spec: ModelSpec) -> Any:
    import torch

    return torch.zeros(2, spec.geometry.crop, spec.geometry.crop, 3, dtype=torch.uint8)


def _compiled(model: Any) -> Any:
    import openvino

    # What NNCF hands over to be judged it has compiled already.
    return model if callable(model) else openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
