"""A model repository for NVIDIA Triton: the Python backend around an archive's handler, or the archive's ONNX graph.

Standard library only, except where `onnxruntime` is the backend, since `serve` imports this too. The form is that of
Triton's documents `model_repository.md` and `model_configuration.md`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archive import mar as reader
from archive import sandbox_context
from beeline.errors import ArchiveError, did_you_mean
from beeline.spec import ModelSpec

BACKENDS = ("python", "onnxruntime")
# Names of tensors: encoded pictures (or their bytes as UINT8), answers, probabilities; of the ONNX graph, as in
# Hugging Face's exports.
PICTURE, BYTES, ANSWER, SCORES, HTTP = "picture", "bytes", "answer", "scores", "http"
PIXELS = "pixel_values"


@dataclass(frozen=True)
class Numbers:
    """How Triton shall batch: pictures, milliseconds, instances (on each of `gpus`, by their numbers; none: CPU).

    `preferred` are batch sizes that are sent on at once; `queue` is the most requests that wait, 0 for no limit.
    """

    batch_size: int = 8
    delay: int = 2
    instances: int = 1
    gpus: tuple[int, ...] = ()
    preferred: tuple[int, ...] = ()
    queue: int = 0


def export(mar: Path, out: Path, numbers: Numbers, backend: str = "python", version: int = 1) -> Path:
    """Write an archive as version `version` of a model into the repository `out`; return the model's folder.

    Another version that is there stays, and the configuration is written again: it is one for all versions.

    Raises:
        ArchiveError: for an archive that Beeline has not built, numbers that Triton refuses, or a version that exists;
            with `onnxruntime` for an archive of another engine, or a graph that no longer answers its goldens.
    """
    if backend not in BACKENDS:
        raise ArchiveError(f"--backend is {backend!r}{did_you_mean(backend, BACKENDS)}")
    if wrong := [size for size in numbers.preferred if not 1 <= size <= numbers.batch_size]:
        raise ArchiveError(f"--preferred has {wrong[0]}; allowed: 1 to the batch size, which is {numbers.batch_size}")
    spec = reader.check(mar).spec
    folder = out / spec.name
    target = folder / str(version)
    if target.exists():
        raise ArchiveError(f"{target} exists; remove it, or give another --number")
    (folder / "warmup").mkdir(parents=True, exist_ok=True)
    archive = target / "archive"
    archive.mkdir(parents=True)
    try:
        reader.unpack(mar, archive)
        goldens = [archive / golden.file for golden in reader.read(mar).goldens]
        if backend == "python":
            shutil.copyfile(Path(__file__).with_name("model.py"), target / "model.py")
            shutil.copyfile(sandbox_context.__file__, target / "context.py")
            samples = [(path.name, _string(path.read_bytes())) for path in goldens]
        else:
            samples = [
                (path.name, data) for path, data in zip(goldens, _float_graph(archive, spec, goldens), strict=True)
            ]
            (archive / "float.onnx").replace(target / "model.onnx")
            shutil.rmtree(archive)
    except BaseException:
        shutil.rmtree(target)
        raise
    for name, data in samples:
        (folder / "warmup" / name).write_bytes(data)
    (folder / "labels.txt").write_text("".join(f"{' '.join(each.split())}\n" for each in spec.labels), "utf-8")
    warm = [(name, 1) for name, _ in samples] + [(samples[0][0], numbers.batch_size)]
    (folder / "config.pbtxt").write_text("\n".join(_lines(_config(spec, numbers, backend, warm))) + "\n", "utf-8")
    return folder


def _config(spec: ModelSpec, numbers: Numbers, backend: str, warm: list[tuple[str, int]]) -> dict[str, object]:
    """Return the fields of Triton's `ModelConfig`; `warm` are the warm-up's files and batch sizes."""
    if backend == "python":
        # A request has one of the two inputs.
        key, kind, dims = PICTURE, "TYPE_STRING", [1]
        inputs = [_tensor(PICTURE, kind, dims, optional=True)]
        inputs += [_tensor(BYTES, "TYPE_UINT8", [-1], optional=True, allow_ragged_batch=True)]
        outputs = [_tensor(ANSWER, kind, dims), _tensor(HTTP, kind, dims)]
    else:
        key, kind, dims = PIXELS, "TYPE_FP32", [3, *spec.geometry.shape]
        inputs, outputs = [_tensor(key, kind, dims)], []
    scores = SCORES if backend == "python" else spec.output
    outputs += [_tensor(scores, "TYPE_FP32", [len(spec.labels)], label_filename="labels.txt")]
    place = {"kind": "KIND_GPU", "gpus": [*numbers.gpus]} if numbers.gpus else {"kind": "KIND_CPU"}
    queue = {"default_queue_policy": {"max_queue_size": numbers.queue}} if numbers.queue else {}
    batching = {"preferred_batch_size": [*numbers.preferred], "max_queue_delay_microseconds": 1000 * numbers.delay}
    warmup = [
        {
            "name": f"{name} x {size}",
            "batch_size": size,
            "inputs": {"key": key, "value": {"data_type": kind, "dims": dims, "input_data_file": name}},
        }
        for name, size in dict.fromkeys(warm)
    ]
    return {
        "name": spec.name,
        "backend": backend,
        "max_batch_size": numbers.batch_size,
        "version_policy": {"all": {}},
        "input": inputs,
        "output": outputs,
        "instance_group": {"count": numbers.instances, **place},
        "dynamic_batching": {**batching, **queue},
        "model_warmup": warmup,
    }


def _float_graph(archive: Path, spec: ModelSpec, goldens: list[Path]) -> list[bytes]:
    """Write the graph as `float.onnx`, which takes float32 `[batch, 3, height, width]` of 0 to 255; replay the goldens.

    Return each golden picture as such values. Scaling and normalisation stay in the graph.
    """
    if spec.model.format != "onnx":
        why = f"{spec.name} {spec.version} is for the engine {spec.engine}, and --backend onnxruntime takes ONNX"
        raise ArchiveError(f"{why}; build it with `beeline archive build --engine onnxruntime`")
    import numpy as np
    import onnx
    from onnx import TensorProto, helper

    from archive.onnx_graph import session
    from beeline import golden, pixels

    model = onnx.load(archive / spec.model.file)
    first = model.graph.input[0]
    model.graph.input.remove(first)
    shape = ["batch", 3, *spec.geometry.shape]
    model.graph.input.insert(0, helper.make_tensor_value_info(PIXELS, TensorProto.FLOAT, shape))
    model.graph.node.insert(0, helper.make_node("Transpose", [PIXELS], [first.name], "nchw_to_nhwc", perm=[0, 2, 3, 1]))
    model.graph.output[0].type.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, ["batch", len(spec.labels)]))
    onnx.checker.check_model(model)
    run = session(model).run

    def planes(rows: Any) -> Any:
        return np.ascontiguousarray(rows.transpose(0, 3, 1, 2), np.float32)

    golden.replay(archive, spec, lambda rows: np.asarray(run(None, {PIXELS: planes(rows)})[0]))
    (archive / "float.onnx").write_bytes(model.SerializeToString(deterministic=True))
    return [planes(pixels.decode(path.read_bytes(), spec.geometry)[None]).tobytes() for path in goldens]


def _tensor(name: str, kind: str, dims: list[int], **others: object) -> dict[str, object]:
    return {"name": name, "data_type": kind, "dims": dims, **others}


def _lines(fields: dict[str, Any], indent: str = "") -> Iterator[str]:
    """Yield a message in the text format of Protocol Buffers; a list is a repeated field."""
    for name, value in fields.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict):
                yield from (f"{indent}{name} {{", *_lines(each, f"{indent}  "), f"{indent}}}")
            else:
                is_enum = isinstance(each, str) and each.startswith(("TYPE_", "KIND_"))
                yield f"{indent}{name}: {each if is_enum else json.dumps(each)}"


def _string(data: bytes) -> bytes:
    """Return one element of a BYTES tensor as the protocol has it: its length before it."""
    return len(data).to_bytes(4, "little") + data
