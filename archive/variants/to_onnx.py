"""An exported model to ONNX, in fp32 or int8, as one file with its weights inside."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from archive.variants.agreement import Gate, Pictures
from archive.variants.int8 import quantised
from archive.variants.to_torch import module
from beeline.errors import ArchiveError, ConfigError
from beeline.spec import Artifact, ModelSpec
from host.files import sha256

FILE = "model.onnx"
PACKAGES = {"fp32": ("onnx", "onnxscript"), "int8": ("onnx", "onnxscript", "nncf")}


def convert(folder: Path, spec: ModelSpec, out: Path, precision: str, pictures: Pictures, gate: Gate) -> Artifact:
    """Write `model.onnx` into `out` and say what it is.

    Args:
        folder: of the export, with the fp32 model.
        spec: of it.
        out: an existing folder.
        precision: one of `PACKAGES`.
        pictures: see `archive.variants.int8.quantised`.
        gate: likewise.

    Raises:
        ArchiveError: for a model that PyTorch cannot write as ONNX.
        ConfigError: where a package that this needs is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401

        from beeline.engines.onnxruntime import INPUT
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is not installed here; install the packages onnx, onnxscript and onnxruntime"
        ) from error
    try:
        model = _exported(folder, spec, INPUT)
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
        (out / FILE).write_bytes(model.SerializeToString(deterministic=True))
    except ConfigError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        raise ArchiveError(f"{spec.model.file} cannot be written as ONNX ({why}); take --engine torch") from error
    return Artifact(FILE, "onnx", sha256(out / FILE), spec.model.architecture)


def _exported(folder: Path, spec: ModelSpec, name: str) -> Any:
    import torch

    if spec.model.format != "exported_program":
        raise ValueError(f"PyTorch writes exported programs as ONNX, and this is {spec.model.format}")
    with warnings.catch_warnings():
        # Of PyTorch's own code, about PyTorch's own code.
        warnings.simplefilter("ignore")
        made = torch.onnx.export(module(folder, spec), dynamo=True, verbose=False, input_names=[name])
    if made is None:
        raise ValueError("PyTorch made nothing")
    return made.model_proto


def _forget_origin(model: Any) -> None:
    """Remove what differs from one process or version to the next, and number what has no name of the model's."""
    model.producer_name, model.producer_version, model.doc_string = "beeline", "", ""
    graph = model.graph
    graph.name, graph.doc_string = "model", ""
    # Shapes of values in between, with symbols by numbers of PyTorch's; runtimes infer them.
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
