"""An exported model to OpenVINO's format, in fp32, bf16 or int8."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archive.agreement import Pictures
from archive.digest import file_sha256
from archive.torch_model import module
from beeline.errors import ArchiveError, ConfigError
from beeline.spec import Artifact, ModelSpec

FILE, WEIGHTS = "model.xml", "model.bin"
PRECISIONS = ("fp32", "bf16", "int8")
PACKAGES = ("openvino", "nncf")
# So many calibrate and control; more change the ranges no longer.
_CALIBRATION, _CONTROL = 200, 200


def convert(folder: Path, spec: ModelSpec, out: Path, precision: str, pictures: Pictures, top1: float) -> Artifact:
    """Write `model.xml` and `model.bin` into `out` and say what they are.

    bf16 differs from fp32 in how the worker computes, not in the file. In int8 accuracy is controlled: layers are put
    back into fp32, those that cost most agreement first, until `top1` holds on the pictures that calibrate.

    Args:
        folder: of the export, with the fp32 model.
        spec: of it.
        out: an existing folder.
        precision: one of `PRECISIONS`.
        pictures: those to calibrate with are used; those to judge by are not looked at.
        top1: the part of equal first labels to keep.

    Raises:
        ArchiveError: for a model that OpenVINO cannot read.
        ConfigError: where OpenVINO or NNCF is not installed.
    """
    # Both report their use through this package where they can import it.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise ConfigError("OpenVINO is not installed here; install the package openvino") from error
    try:
        with warnings.catch_warnings():
            # Of PyTorch's own code, about PyTorch's own code.
            warnings.simplefilter("ignore")
            model = openvino.convert_model(module(folder, spec), example_input=_example(spec))
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        raise ArchiveError(
            f"{spec.model.file} cannot be converted for OpenVINO ({why}); take --engine torch"
        ) from error
    crop = spec.geometry.crop
    model.reshape(openvino.PartialShape([-1, crop, crop, 3]))
    _name(model)
    if precision == "int8":
        model = _quantised(model, spec, pictures, top1)
        _name(model)
    openvino.save_model(model, out / FILE, compress_to_fp16=False)
    return Artifact(
        FILE,
        "openvino",
        file_sha256(out / FILE),
        spec.model.architecture,
        weights=WEIGHTS,
        weights_sha256=file_sha256(out / WEIGHTS),
    )


def _name(model: Any) -> None:
    """Number the operations: OpenVINO's own names count on from what the process made before."""
    model.set_friendly_name("model")
    for number, operation in enumerate(model.get_ordered_ops()):
        operation.set_friendly_name(f"{operation.get_type_name().lower()}_{number}")


def _example(spec: ModelSpec) -> Any:
    import torch

    return torch.zeros(2, spec.geometry.crop, spec.geometry.crop, 3, dtype=torch.uint8)


def _quantised(model: Any, spec: ModelSpec, pictures: Pictures, top1: float) -> Any:
    try:
        import nncf
    except ModuleNotFoundError as error:
        raise ConfigError("NNCF, which int8 needs, is not installed here; install the package nncf") from error
    import openvino

    crops = pictures.calibration
    ones: Sequence[NDArray[np.uint8]] = [crop[None] for crop in crops[:_CALIBRATION]]
    control = [crop[None] for crop in crops[:_CONTROL]]
    first = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    labels = [int(first(one)[0].argmax()) for one in control]

    def agreement(compiled: Any, data: Any) -> tuple[float, list[float]]:
        same = [float(int(compiled(one)[0].argmax()) == label) for one, label in zip(data, labels, strict=False)]
        return sum(same) / len(same), same

    logging.getLogger("nncf").setLevel(logging.WARNING)
    # Its progress bars are in nobody's terms.
    with contextlib.redirect_stdout(io.StringIO()):
        return nncf.quantize_with_accuracy_control(
            model,
            calibration_dataset=nncf.Dataset(ones),
            validation_dataset=nncf.Dataset(control),
            validation_fn=agreement,
            max_drop=1 - top1,
            subset_size=len(ones),
        )
