"""An exported model to the artifact of each engine, and what its graph normalises with.

Each conversion takes the folder of the export with its fp32 model and spec, an existing folder for the artifact, a
precision, and the pictures and gate of `archive.variants.int8.quantised`. It returns what it wrote.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

from archive.goldens.mistakes import Photometry
from archive.variants.agreement import Gate, Pictures
from archive.variants.int8 import quantised
from beeline.errors import ArchiveError
from beeline.spec import Artifact, ModelSpec
from host.files import sha256

_ONNX, _OPENVINO, _OPENVINO_WEIGHTS = "model.onnx", "model.xml", "model.bin"


def to_torch(folder: Path, spec: ModelSpec, out: Path, precision: str, pictures: Pictures, gate: Gate) -> Artifact:
    """Copy the model into `out`: only the spec says what the worker computes in."""
    for name in spec.model.digests:
        shutil.copyfile(folder / name, out / name)
    return spec.model


def to_torch_compile(
    folder: Path, spec: ModelSpec, out: Path, precision: str, pictures: Pictures, gate: Gate
) -> Artifact:
    """Copy the model into `out`, as `to_torch`.

    Raises:
        ArchiveError: for TorchScript, which `torch.compile` does not look into.
    """
    if spec.model.format != "exported_program":
        raise ArchiveError(
            f"{spec.model.file} is {spec.model.format}, which torch.compile cannot read; take --engine torch, or bring "
            "the model as an exported program"
        )
    return to_torch(folder, spec, out, precision, pictures, gate)


def to_openvino(folder: Path, spec: ModelSpec, out: Path, precision: str, pictures: Pictures, gate: Gate) -> Artifact:
    """Write `model.xml` and `model.bin` into `out`.

    bf16 differs from fp32 in how the worker computes, not in the file.

    Raises:
        Exception: whatever OpenVINO raises for a model that it cannot read.
    """
    import openvino
    import torch

    crop = spec.geometry.crop
    with warnings.catch_warnings():
        # PyTorch warns about its own code.
        warnings.simplefilter("ignore")
        example = torch.zeros(2, crop, crop, 3, dtype=torch.uint8)
        model = openvino.convert_model(module(folder, spec), example_input=example)
    model.reshape(openvino.PartialShape([-1, crop, crop, 3]))
    _number(model)
    if precision == "int8":
        model = quantised(model, pictures, gate, spec.output, _compiled, lambda compiled, one: compiled(one)[0])
        _number(model)
    openvino.save_model(model, out / _OPENVINO, compress_to_fp16=False)
    return Artifact(
        _OPENVINO,
        "openvino",
        sha256(out / _OPENVINO),
        spec.model.architecture,
        weights=_OPENVINO_WEIGHTS,
        weights_sha256=sha256(out / _OPENVINO_WEIGHTS),
    )


def to_onnx(folder: Path, spec: ModelSpec, out: Path, precision: str, pictures: Pictures, gate: Gate) -> Artifact:
    """Write `model.onnx` into `out`, one file with the weights inside.

    Raises:
        ArchiveError: for TorchScript. Exception: whatever PyTorch raises for a model that it cannot write.
    """
    import torch

    from beeline.engines.onnxruntime import INPUT

    if spec.model.format != "exported_program":
        raise ArchiveError(
            f"{spec.model.file} is {spec.model.format}, and PyTorch writes only exported programs as ONNX; take "
            "--engine torch, or bring the model as an exported program"
        )
    with warnings.catch_warnings():
        # PyTorch warns about its own code.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module(folder, spec), dynamo=True, verbose=False, input_names=[INPUT])
    assert program is not None
    model: Any = program.model_proto
    _forget_origin(model)
    if precision == "int8":
        model = quantised(
            model,
            pictures,
            gate,
            spec.output,
            _session,
            lambda session, one: session.run(None, {INPUT: one})[0],
            lambda one: {INPUT: one},
        )
        _forget_origin(model)
    (out / _ONNX).write_bytes(model.SerializeToString(deterministic=True))
    return Artifact(_ONNX, "onnx", sha256(out / _ONNX), spec.model.architecture)


def module(folder: Path, spec: ModelSpec) -> Any:
    """Return the model as a callable module: uint8 `[N, crop, crop, 3]` to `[N, classes]`."""
    import torch

    path = folder / spec.model.file
    if spec.model.format == "torchscript":
        return torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    return torch.export.load(path)


def photometry(folder: Path, spec: ModelSpec) -> Photometry:
    """Return the mean and the deviation that the graph normalises with, per RGB channel, of values of 0..1.

    They are in the buffers that `archive.graph.Uint8Input` adds. A network that takes uint8 itself has no such buffers;
    mean 0 and deviation 1 stand for that.
    """
    made = module(folder, spec)
    buffers = dict(made.state_dict() if callable(made.state_dict) else made.state_dict)
    if "scale" not in buffers or "shift" not in buffers:
        return ((0.0,) * 3, (1.0,) * 3)
    deviation = [1 / (255 * float(value)) for value in buffers["scale"].flatten()[:3]]
    mean = [-float(value) * std for value, std in zip(buffers["shift"].flatten()[:3], deviation, strict=True)]
    return (mean, deviation)


def _number(model: Any) -> None:
    """Number the operations: OpenVINO's own names depend on what the process made before."""
    model.set_friendly_name("model")
    for number, operation in enumerate(model.get_ordered_ops()):
        operation.set_friendly_name(f"{operation.get_type_name().lower()}_{number}")


def _compiled(model: Any) -> Any:
    import openvino

    # NNCF passes a compiled model to be judged.
    return model if callable(model) else openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def _forget_origin(model: Any) -> None:
    """Remove from an ONNX model what differs between processes or versions, and number its operations."""
    model.producer_name, model.producer_version, model.doc_string = "beeline", "", ""
    graph = model.graph
    graph.name, graph.doc_string = "model", ""
    # Shapes of intermediate values, with symbols that PyTorch numbers; runtimes infer them.
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        shape = value.type.tensor_type.shape.dim
        if not shape[0].HasField("dim_value"):
            shape[0].dim_param = "batch"
    for number, node in enumerate(graph.node):
        node.name = f"{node.op_type.lower()}_{number}"
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *model.functions):
        part.doc_string = ""
        del part.metadata_props[:]


def _session(model: Any) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
