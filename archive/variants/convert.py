"""From an exported model to the artifact of each engine, in int8 by NNCF where it is asked for.

The converters have one signature: the folder of the export, its spec, an existing folder for the artifact, a precision,
and the pictures and the gate of `quantised`. They return what they wrote. They raise `ArchiveError`, or whatever the
library raises for a model that it cannot convert.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import sys
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from archive.variants.agreement import Gate, Pictures, same_first
from beeline.classification import probabilities
from beeline.errors import ArchiveError
from beeline.spec import Artifact, ModelSpec
from host.files import sha256

if TYPE_CHECKING:
    from archive.goldens.mistakes import Photometry

# OpenVINO and NNCF report their use through this package if they can import it.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

_OPENVINO, _OPENVINO_WEIGHTS = "model.xml", "model.bin"
# At most so many pictures calibrate int8, and so many others control it; more do not change the ranges any further.
_CALIBRATION, _CONTROL = 200, 200
# How much of a picture's mark is how far its probabilities move. It ranks layers that cost no picture its label.
_NEAR = 1e-3
# A runnable graph and one picture, uint8 `[1, crop, crop, 3]`, to its scores.
Scores = Callable[[Any, NDArray[np.uint8]], NDArray[np.float32]]


def to_torch(folder: Path, spec: ModelSpec, out: Path, *unused: object) -> Artifact:
    """Copy the model. Only the spec says in which precision the worker computes."""
    for name in spec.model.digests:
        shutil.copyfile(folder / name, out / name)
    return spec.model


def to_torch_compile(folder: Path, spec: ModelSpec, out: Path, *unused: object) -> Artifact:
    """Copy the model."""
    _require_program(spec, "which torch.compile cannot read")
    return to_torch(folder, spec, out)


def to_openvino(folder: Path, spec: ModelSpec, out: Path, precision: str, pictures: Pictures, gate: Gate) -> Artifact:
    """Write `model.xml` and `model.bin`. bf16 is the same file as fp32; only the worker computes differently."""
    import openvino
    import torch

    shape = spec.geometry.shape
    with warnings.catch_warnings():
        # PyTorch warns about its own code.
        warnings.simplefilter("ignore")
        if spec.model.format == "onnx":
            model = openvino.convert_model(folder / spec.model.file)
        else:
            example = torch.zeros(2, *shape, 3, dtype=torch.uint8)
            model = openvino.convert_model(module(folder, spec), example_input=example)
    model.reshape(openvino.PartialShape([-1, *shape, 3]))
    number(model)

    def compiled(model: Any) -> Any:
        # NNCF also passes compiled models.
        return model if callable(model) else openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    if precision == "int8":
        model = quantised(model, pictures, gate, spec.output, compiled, lambda runnable, one: runnable(one)[0])
        number(model)
    openvino.save_model(model, out / _OPENVINO, compress_to_fp16=False)
    graph, weights = sha256(out / _OPENVINO), sha256(out / _OPENVINO_WEIGHTS)
    return Artifact(_OPENVINO, "openvino", graph, spec.model.architecture, _OPENVINO_WEIGHTS, weights)


def to_onnx(folder: Path, spec: ModelSpec, out: Path, precision: str, pictures: Pictures, gate: Gate) -> Artifact:
    """Write `model.onnx`, one file with the weights inside."""
    from archive.graph import ONNX_FILE
    from archive.onnx_graph import remove_origin, session
    from beeline.engines.onnxruntime import INPUT

    model = _onnx(folder, spec, INPUT)

    def feed(one: NDArray[np.uint8]) -> dict[str, Any]:
        return {INPUT: one}

    if precision == "int8":
        model = quantised(
            model, pictures, gate, spec.output, session, lambda runnable, one: runnable.run(None, feed(one))[0], feed
        )
        remove_origin(model)
    (out / ONNX_FILE).write_bytes(model.SerializeToString(deterministic=True))
    return Artifact(ONNX_FILE, "onnx", sha256(out / ONNX_FILE), spec.model.architecture)


def _onnx(folder: Path, spec: ModelSpec, name: str) -> Any:
    import onnx
    import torch

    from archive.onnx_graph import remove_origin

    if spec.model.format == "onnx":
        return onnx.load(folder / spec.model.file)
    _require_program(spec, "which PyTorch cannot write as ONNX")
    with warnings.catch_warnings():
        # PyTorch warns about its own code.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module(folder, spec), dynamo=True, verbose=False, input_names=[name])
    if program is None:
        raise ArchiveError(f"PyTorch made no ONNX of {spec.model.file}; take --engine torch")
    model: Any = program.model_proto
    remove_origin(model)
    return model


def quantised(
    model: Any,
    pictures: Pictures,
    gate: Gate,
    output: str,
    runnable: Callable[[Any], Any],
    scores: Scores,
    feed: Callable[[NDArray[np.uint8]], Any] = lambda one: one,
) -> Any:
    """Return the graph in int8. Layers stay in fp32 if the gate needs that, on pictures that did not calibrate.

    Args:
        model: an fp32 graph that NNCF knows.
        pictures: of those to calibrate with, every second one calibrates and the others control, since a graph is
            better on the pictures that its ranges are from. Those to judge by are not used.
        gate: the limits for the controlling pictures. The gate itself judges by other pictures.
        output: what the model returns, as its spec says.
        runnable: makes a graph runnable.
        scores: runs the result of `runnable`, or what NNCF makes of the graph.
        feed: turns a picture into what NNCF gives to the graph.
    """
    # PyTorch's part for extensions, which NNCF imports, warns if CUDA's compiler is installed without a CUDA device.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import nncf
    ones = [crop[None] for crop in pictures.calibration[0::2][:_CALIBRATION]]
    reference = runnable(model)
    # Each with its probabilities, since NNCF ranks layers by a subset: the pictures that lose most.
    control = [
        (crop[None], probabilities(scores(reference, crop[None]), output)[0])
        for crop in pictures.calibration[1::2][:_CONTROL]
    ]

    def validate(candidate: Any, data: Any) -> tuple[float, list[float]]:
        """Return one plus the gate's slack over these pictures, since NNCF divides by it, and a mark for each."""
        ready = runnable(candidate)
        pairs = [(probabilities(scores(ready, one), output)[0], expected) for one, expected in data]
        actual, expected = (np.stack(rows) for rows in zip(*pairs, strict=True))
        moved, same = np.abs(actual - expected).max(axis=1), same_first(expected, actual, output)
        marks = (same & (moved <= gate.moved)) - _NEAR * moved
        return 1 + gate.slack(same, moved) - _NEAR * float(moved.mean()), marks.tolist()

    # NNCF compares with the graph in fp32, which moves nothing and has all the slack.
    most = gate.slack(np.ones(len(control), bool), np.zeros(len(control)))
    logging.getLogger("nncf").setLevel(logging.WARNING)
    # NNCF's progress bars and its warnings about its libraries tell users nothing.
    with silence(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nncf.quantize_with_accuracy_control(
            model,
            calibration_dataset=nncf.Dataset(ones, feed),
            validation_dataset=nncf.Dataset(control, lambda each: feed(each[0])),
            validation_fn=validate,
            max_drop=most + _NEAR,
            subset_size=len(ones),
        )


def silence() -> contextlib.redirect_stdout[io.StringIO]:
    """Keep the progress bars of NNCF from a command's output."""
    return contextlib.redirect_stdout(io.StringIO())


@lru_cache(maxsize=1)
def module(folder: Path, spec: ModelSpec) -> Any:
    """Return the model as a callable module: uint8 `[N, crop, crop, 3]` to `[N, classes]`."""
    import torch

    path = folder / spec.model.file
    if spec.model.format == "torchscript":
        return torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    return torch.export.load(path)


def photometry(folder: Path, spec: ModelSpec) -> Photometry:
    """Return the mean and the deviation of the graph's normalisation, per RGB channel, of values of 0..1.

    They are in the buffers of `archive.graph.Uint8Input`; without these, of a network that takes uint8, 0 and 1.
    """
    if spec.model.format == "onnx":
        from archive.onnx_graph import normalisation

        buffers = normalisation(folder / spec.model.file)
    else:
        model = module(folder, spec)
        buffers = dict(model.state_dict() if callable(model.state_dict) else model.state_dict)
    if "scale" not in buffers or "shift" not in buffers:
        return ((0.0,) * 3, (1.0,) * 3)
    deviation = [1 / (255 * float(value)) for value in buffers["scale"].flatten()[:3]]
    mean = [-float(value) * std for value, std in zip(buffers["shift"].flatten()[:3], deviation, strict=True)]
    return (mean, deviation)


def _require_program(spec: ModelSpec, why: str) -> None:
    if spec.model.format != "exported_program":
        fix = "take --engine torch, or an exported program"
        raise ArchiveError(f"{spec.model.file} is {spec.model.format}, {why}; {fix}")


def number(model: Any) -> None:
    """Number the operations. OpenVINO's own names depend on what the process made before."""
    model.set_friendly_name("model")
    for number, operation in enumerate(model.get_ordered_ops()):
        operation.set_friendly_name(f"{operation.get_type_name().lower()}_{number}")
