"""ONNX models that users bring, made into one graph of uint8 pictures; ONNX Runtime in fp32 is their reference."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from archive.graph import MIXES, ONNX_FILE, Preprocessing, check_planes
from archive.outputs import AGAIN, Both, Element, Rows
from beeline.engines.onnxruntime import INPUT
from beeline.errors import ArchiveError, short

# Of the values of the normalisation. Names of the user's graph get `_INNER` before them.
SCALE, SHIFT, _INNER = "scale", "shift", "net/"
# A file of Protocol Buffers cannot be larger.
_LARGEST = 2**31 - 1


def load(path: Path) -> Any:
    """Read an ONNX model and its external weights; raise `ArchiveError` for one that ONNX Runtime cannot run."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        needs = f"{path} is ONNX and needs {error.name}, which is not installed"
        raise ArchiveError(f"{needs}; run `make setup`") from error
    try:
        model = onnx.load(path)
        if (size := model.ByteSize()) > _LARGEST:
            raise ArchiveError(f"{path} has {size / 1e9:.1f} GB; allowed: 2 GiB, since its weights go into one file")
        session(model)
    except ArchiveError:
        raise
    except Exception as error:
        why = short(error, 240, end=True)
        fix = "download or copy it again, or export it again"
        if isinstance(error, FileNotFoundError) or re.search("external|stored in", why, re.IGNORECASE):
            fix = "copy the file of its weights beside it"
        elif match := re.search(r"till opset (\d+)", str(error)):
            fix = f"export it with opset_version={match[1]}"
        elif re.search(r"tensor\(bfloat16\)|find an implementation", why):
            fix = "export it in float32, after model.float()"
        elif re.search(r"No Op registered|not a registered function/op", str(error)):
            fix = "export it again with operations of ONNX alone"
        raise ArchiveError(f"{path} does not load in ONNX Runtime {onnxruntime.__version__} ({why}); {fix}") from error
    return model


def session(model: Any) -> Any:
    """Return a session on the CPU with two threads, whose results are the same on any number of cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 2
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class OnnxGraph:
    """As `archive.graph.Graph`, for an ONNX model of one input: float NCHW or NHWC, or uint8 NHWC with `takes_uint8`.

    Raise `ArchiveError` for another input, with what to do.
    """

    format = "onnx"

    def __init__(self, model: Any, preprocessing: Preprocessing) -> None:
        from onnx import TensorProto, compose, helper

        self.shape, self.notes = preprocessing.geometry.shape, list[str]()
        mean, std, takes_uint8 = preprocessing.mean, preprocessing.std, preprocessing.takes_uint8
        weights = {each.name for each in model.graph.initializer}
        inputs = [each.name for each in model.graph.input if each.name not in weights]
        if len(inputs) != 1:
            names = ", ".join(inputs) or "none"
            raise ArchiveError(f"the ONNX model has the inputs {names}; allowed: one, of pictures")
        self._model = compose.add_prefix(model, _INNER)
        graph = self._graph = self._model.graph
        _flush_denormals(graph)
        first = next(each for each in graph.input if each.name == _INNER + inputs[0])
        kind = first.type.tensor_type.elem_type
        if (kind == TensorProto.UINT8) != takes_uint8:
            named = TensorProto.DataType.Name(kind).lower()
            fix = "leave out --uint8-input" if takes_uint8 else "add --uint8-input, if it normalises them itself"
            raise ArchiveError(f"the ONNX model's input {inputs[0]} is {named}; {fix}")
        sides = [each.dim_value if each.HasField("dim_value") else None for each in first.type.tensor_type.shape.dim]
        is_last = len(sides) == 4 and (takes_uint8 or sides[3] in (1, 3)) and sides[1] not in (1, 3)
        self.planes = self._check(sides, is_last)
        channels = "grey" if self.planes == 1 else preprocessing.channels
        graph.input.insert(0, helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["batch", *self.shape, 3]))
        graph.input.remove(first)
        own = list(graph.node)
        del graph.node[:]
        if takes_uint8:
            self._add("Transpose", [INPUT], first.name, perm=[0, 1, 2, 3] if is_last else [0, 3, 1, 2])
        else:
            rows = self._add("Cast", [INPUT], to=TensorProto.FLOAT)
            rows = self._add("Mul", [rows, self._value(SCALE, 1 / (255 * np.asarray(std)))])
            rows = self._add("Add", [rows, self._value(SHIFT, -np.asarray(mean) / np.asarray(std))])
            if channels != "rgb":
                rows = self._add("MatMul", [rows, self._value("mix", np.transpose(MIXES[channels]))])
            if not is_last:
                rows = self._add("Transpose", [rows], perm=[0, 3, 1, 2])
            self._add("Cast", [rows], first.name, to=kind)
        graph.node.extend(own)
        self._session: Any = None

    def _check(self, sides: Sequence[int | None], is_last: bool) -> int:
        """Check the input's shape, in which None is any number, and return how many channels it has."""
        high, wide = self.shape
        again = AGAIN["onnx"].format(f"{high}, {wide}")
        if len(sides) != 4:
            raise ArchiveError(f"the ONNX model's input is {list(sides)}; allowed: [batch, 3, {high}, {wide}]: {again}")
        if sides[0] is not None:
            raise ArchiveError(f"the ONNX model takes batches of exactly {sides[0]}; export it for every size: {again}")
        own_high, own_wide = sides[1:3] if is_last else sides[2:]
        if own_high not in (None, high) or own_wide not in (None, wide):
            takes = f"takes pictures of {own_wide} x {own_high} pixels, and the crop is {wide} x {high}"
            fix = f"add --crop {own_wide}x{own_high}, and the --resize that it was trained with"
            raise ArchiveError(f"the ONNX model {takes}; {fix}")
        planes = sides[3 if is_last else 1] or 3
        self.notes += check_planes(planes)
        return planes

    def _value(self, name: str, value: Any) -> str:
        from onnx import numpy_helper

        self._graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name

    def _add(self, operation: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        from onnx import helper

        name = output or f"{operation.lower()}_{len(self._graph.node)}"
        self._graph.node.append(helper.make_node(operation, inputs, [name], **attributes))
        return name

    def append(self, last: nn.Module) -> None:
        """Let a module of `archive.outputs`, or a sigmoid, make something else of the outputs."""
        from onnx import TensorProto, helper

        rows = self._graph.output[0].name
        if isinstance(last, Element):
            rows = _INNER + str(last.key)
        elif isinstance(last, Rows):
            rows = self._add("Cast", [self._add("Flatten", [rows], axis=1)], to=TensorProto.FLOAT)
        elif isinstance(last, Both):
            other = self._add("Mul", [rows, self._value("sign", -last.first)])
            rows = self._add("Concat", [self._add("Add", [other, self._value("first", last.first)]), rows], axis=1)
        else:
            rows = self._add("Sigmoid", [rows])
        del self._graph.output[:]
        self._graph.output.append(helper.make_tensor_value_info(rows, TensorProto.FLOAT, None))
        self._session = None

    def __call__(self, pixels: Tensor) -> Any:
        """Run on uint8 `[N, height, width, 3]`. Return a tensor, or tensors by name where the model has several."""
        self._session = self._session or session(self._model)
        found = self._session.run(None, {INPUT: pixels.numpy()})
        values = {
            # Names of classes and tables of them are no tensors.
            each.name.removeprefix(_INNER): torch.from_numpy(array) if array.dtype.kind in "fiub" else array
            for each, array in zip(self._graph.output, map(np.asarray, found), strict=True)
        }
        return values if len(values) > 1 else next(iter(values.values()))

    def takes(self, shape: tuple[int, int], planes: int | None = None, pictures: int = 1) -> bool:
        """Return whether it runs on so many pictures of so many pixels."""
        with suppress(Exception):
            self(torch.zeros(pictures, *shape, 3, dtype=torch.uint8))
            return True
        return False

    def differentiable(self, pixels: Tensor) -> Tensor:
        """Raise `RuntimeError`, as `archive.goldens` expects of a model without gradients."""
        raise RuntimeError("ONNX Runtime computes none")

    def save(self, folder: Path) -> Path:
        """Write `model.onnx` with the weights inside, and return its path."""
        remove_origin(self._model)
        (folder / ONNX_FILE).write_bytes(self._model.SerializeToString(deterministic=True))
        return folder / ONNX_FILE


def normalisation(path: Path) -> dict[str, Any]:
    """Return the values of a saved graph's normalisation by the names of `archive.graph.Uint8Input`'s buffers."""
    import onnx

    values = onnx.load(path).graph.initializer
    return {each.name: onnx.numpy_helper.to_array(each) for each in values if each.name in (SCALE, SHIFT)}


def remove_origin(model: Any) -> None:
    """Remove from an ONNX model what differs between processes or versions, and number its operations."""
    model.producer_name, model.producer_version, model.doc_string = "beeline", "", ""
    graph = model.graph
    graph.name, graph.doc_string = "model", ""
    # Shapes of intermediate values, with symbols that PyTorch numbers; runtimes infer them.
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        shape = value.type.tensor_type.shape.dim
        if shape and not shape[0].HasField("dim_value"):
            shape[0].dim_param = "batch"
    for number, node in enumerate(graph.node):
        node.name = f"{node.op_type.lower()}_{number}"
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *model.functions):
        part.doc_string = ""
        del part.metadata_props[:]


def _flush_denormals(graph: Any) -> None:
    """Set denormal weights to zero, since they make a processor ten times slower."""
    from onnx import TensorProto, numpy_helper

    for each in graph.initializer:
        if each.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(each)
            denormal = (values != 0) & (np.abs(values) < np.finfo(np.float32).tiny)
            if denormal.any():
                each.CopyFrom(numpy_helper.from_array(np.where(denormal, np.float32(0), values), each.name))
