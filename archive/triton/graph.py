"""An archive's ONNX graph as Triton's ONNX Runtime backend takes it; apart, since `serve` must not import ONNX."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.compose
from onnx import TensorProto, helper

from archive.onnx_graph import session
from archive.triton import PIXELS
from beeline import engines, golden, pixels, tasks
from beeline.errors import ArchiveError, SelfTestError
from beeline.spec import EXPECTED, GOLDEN, ModelSpec

# From the client's `[batch, 3, height, width]` to the graph's `[batch, height, width, 3]`.
_PERMUTATION = (0, 2, 3, 1)


_STEP = """input {{ name: "pixel_values" data_type: TYPE_FP32 dims: 3 dims: {high} dims: {wide} }}
input {{ name: "input_ids" data_type: TYPE_INT64 dims: -1 }}
input {{ name: "attention_mask" data_type: TYPE_INT64 dims: -1 }}
output {{ name: "logits" data_type: TYPE_FP32 dims: 1 dims: {words} }}"""


def write(archive: Path, spec: ModelSpec, goldens: Sequence[Path], target: Path) -> tuple[str, list[bytes]]:
    """Write the graph with an input of float32 `[batch, 3, height, width]` of 0 to 255, once it answers the goldens.

    Return each golden picture as such values. Scaling and normalisation stay in the graph. Raise ArchiveError for an
    archive of another engine, and SelfTestError where an answer differs.
    """
    if spec.model.format != "onnx":
        why = f"{spec.name} {spec.version} is for the engine {spec.engine}, and --backend onnxruntime takes ONNX"
        raise ArchiveError(f"{why}; build it with `beeline archive build --engine onnxruntime`")
    if spec.caption:
        return write_step(archive, spec, goldens, target), []
    model = onnx.load(archive / spec.model.file)
    first = model.graph.input[0]
    model.graph.input.remove(first)
    shape: list[str | int | None] = ["batch", 3, *spec.geometry.shape]
    model.graph.input.insert(0, helper.make_tensor_value_info(PIXELS, TensorProto.FLOAT, shape))
    model.graph.node.insert(0, helper.make_node("Transpose", [PIXELS], [first.name], perm=_PERMUTATION))
    (last,) = model.graph.output
    model.graph.node.append(helper.make_node("Identity", [last.name], [spec.output]))
    model.graph.output.remove(last)
    shape = ["batch", len(spec.labels)]
    model.graph.output.append(helper.make_tensor_value_info(spec.output, TensorProto.FLOAT, shape))
    onnx.checker.check_model(model)
    run = session(model).run

    def planes(rows: Any) -> Any:
        return np.ascontiguousarray(rows.transpose(0, 3, 1, 2), np.float32)

    golden.replay(archive, spec, lambda rows: np.asarray(run(None, {PIXELS: planes(rows)})[0]))
    target.write_bytes(model.SerializeToString(deterministic=True))
    return "", [planes(pixels.decode(path.read_bytes(), spec.geometry)[None]).tobytes() for path in goldens]


def write_step(archive: Path, spec: ModelSpec, goldens: Sequence[Path], target: Path) -> str:
    """Write one step of a captioning model, as transformers' own `forward`, once it scores the golden captions alike.

    `pixel_values` float32 `[N, 3, H, W]` of 0 to 255, `input_ids` and `attention_mask` int64 `[N, T]` give `logits`
    `[N, 1, vocabulary]` of the last token, so a client appends the best one and asks again. Return its tensors.
    """
    assert spec.caption is not None
    encoder, decoder = (
        onnx.compose.add_prefix(onnx.load(archive / each.file), f"{name}/")
        for name, each in (("encoder", spec.model), ("decoder", spec.caption.decoder))
    )
    model = onnx.compose.merge_models(encoder, decoder, io_map=[("encoder/cross", "decoder/cross")])
    graph, high, wide = model.graph, *spec.geometry.shape
    past = next(each for each in graph.input if each.name == "decoder/past")
    _, _, layers, heads, _, depth = (each.dim_value for each in past.type.tensor_type.shape.dim)
    one = {"one": [1], "none": [0], "start": [0], "end": [1], "empty": [1, layers, heads, 0, depth]}
    graph.initializer.extend(onnx.numpy_helper.from_array(np.array(each, np.int64), name) for name, each in one.items())
    nodes: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Transpose", ["pixel_values"], "encoder/pixels", {"perm": _PERMUTATION}),
        ("Unsqueeze", ["input_ids", "one"], "decoder/ids", {}),
        ("Cast", ["attention_mask"], "decoder/mask", {"to": TensorProto.FLOAT}),
        ("CumSum", ["attention_mask", "one"], "counts", {}),
        ("Sub", ["counts", "one"], "places", {}),
        ("Max", ["places", "none"], "decoder/positions", {}),
        ("Shape", ["input_ids"], "shape", {}),
        ("Slice", ["shape", "start", "end"], "count", {}),
        ("Concat", ["count", "empty"], "sides", {"axis": 0}),
        ("ConstantOfShape", ["sides"], "decoder/past", {}),
    ]
    own = list(graph.node)
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend(helper.make_node(kind, inputs, [out], **more) for kind, inputs, out, more in nodes)
    graph.node.extend([*own, helper.make_node("Identity", ["decoder/logits"], ["logits"])])
    shapes: dict[str, list[str | int | None]] = {
        PIXELS: ["batch", 3, high, wide],
        "input_ids": ["batch", "tokens"],
        "attention_mask": ["batch", "tokens"],
    }
    for name, shape in shapes.items():
        kind = TensorProto.FLOAT if name == PIXELS else TensorProto.INT64
        graph.input.append(helper.make_tensor_value_info(name, kind, shape))
    graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1, "words"]))
    onnx.checker.check_model(model)
    words = _check_step(session(model), archive, spec, goldens)
    target.write_bytes(model.SerializeToString(deterministic=True))
    return _STEP.format(high=high, wide=wide, words=words)


def _check_step(run: Any, archive: Path, spec: ModelSpec, goldens: Sequence[Path]) -> int:
    """Score the golden captions by the graph, token by token; return how many words it knows."""
    task: Any = tasks.of(spec)
    task.load(archive, engines.load(archive, spec, device="cpu"))
    entries, words = json.loads((archive / GOLDEN / EXPECTED).read_text(encoding="utf-8"))["pictures"], 0
    for path, entry in zip(goldens, entries, strict=True):
        crops = pixels.decode(path.read_bytes(), spec.geometry)[None].transpose(0, 3, 1, 2).astype(np.float32)
        ids, logarithms = [*task.options("", None).ids], list[float]()
        for token in entry["ids"]:
            given = np.array([ids], np.int64)
            row = run.run(["logits"], {PIXELS: crops, "input_ids": given, "attention_mask": np.ones_like(given)})[0][
                0, 0
            ]
            words, logarithms = len(row), [*logarithms, row[token] - np.logaddexp.reduce(row.astype(np.float64))]
            ids.append(token)
        score, expected = float(np.exp(np.mean(logarithms))), entry["top"][0][1]
        if not abs(score - expected) <= spec.tolerance:
            raise SelfTestError(f"{path.name} gets the score {score:.3f}, expected {expected:.3f}; export it again")
    return words
