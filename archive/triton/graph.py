"""An archive's ONNX graph as Triton's ONNX Runtime backend takes it; apart, since `serve` must not import ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from archive.onnx_graph import session
from archive.triton import PIXELS
from beeline import golden, pixels
from beeline.errors import ArchiveError
from beeline.spec import ModelSpec

# From the client's `[batch, 3, height, width]` to the graph's `[batch, height, width, 3]`.
_PERMUTATION = (0, 2, 3, 1)


def write(archive: Path, spec: ModelSpec, goldens: Sequence[Path], target: Path) -> list[bytes]:
    """Write the graph with an input of float32 `[batch, 3, height, width]` of 0 to 255, once it answers the goldens.

    Return each golden picture as such values. Scaling and normalisation stay in the graph. Raise ArchiveError for an
    archive of another engine, and SelfTestError where an answer differs.
    """
    if spec.model.format != "onnx":
        why = f"{spec.name} {spec.version} is for the engine {spec.engine}, and --backend onnxruntime takes ONNX"
        raise ArchiveError(f"{why}; build it with `beeline archive build --engine onnxruntime`")
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
    return [planes(pixels.decode(path.read_bytes(), spec.geometry)[None]).tobytes() for path in goldens]
