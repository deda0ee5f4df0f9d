"""A model repository for NVIDIA Triton: the Python backend around an archive's handler, or the archive's ONNX graph.

Standard library only, since `serve` imports it. The form is that of Triton's documents `model_repository.md` and
`model_configuration.md`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from archive import mar as reader
from archive import sandbox_context
from beeline.errors import ArchiveError
from beeline.spec import ModelSpec

# Writes the ONNX graph of an unpacked archive to a path; returns its inputs and outputs as `config.pbtxt` has them, if
# they are not one of pictures and one of scores, and golden pictures as it takes them.
WriteGraph = Callable[[Path, ModelSpec, Sequence[Path], Path], "tuple[str, list[bytes]]"]
# The input of the ONNX graph, by its usual name.
PIXELS = "pixel_values"
_CONFIG = """name: {name}
backend: "{backend}"
max_batch_size: {numbers.batch_size}
version_policy {{ all {{}} }}
{tensors}
instance_group {{
  count: {numbers.instances}
  {place}
}}
dynamic_batching {{ {preferred} max_queue_delay_microseconds: {delay} {queue} }}
{warmups}
"""
# A request to the handler has one of the two inputs.
_HANDLER = """input {{ name: "picture" {first} optional: true }}
input {{ name: "bytes" data_type: TYPE_UINT8 dims: -1 optional: true allow_ragged_batch: true }}
output {{ name: "answer" {first} }}
output {{ name: "http" {first} }}"""
_SCORES = 'output {{ name: "{name}" data_type: TYPE_FP32 dims: {classes} label_filename: "labels.txt" }}'
_WARMUP = """model_warmup {{
  name: "{file} x {size}"
  batch_size: {size}
  inputs {{ key: "{key}" value {{ {first} input_data_file: "{file}" }} }}
}}"""


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


def export(mar: Path, out: Path, numbers: Numbers, version: int = 1, graph: WriteGraph | None = None) -> Path:
    """Write an archive as version `version` of a model into the repository `out`; return the model's folder.

    Another version that is there stays, and the configuration is written again: it is one for all versions. With
    `graph` the backend is ONNX Runtime. Raise ArchiveError for an archive that Beeline has not built, numbers that
    Triton refuses, a version that exists, and what `graph` raises.
    """
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
        if graph is None:
            shutil.copyfile(Path(__file__).with_name("model.py"), target / "model.py")
            shutil.copyfile(sandbox_context.__file__, target / "context.py")
            # Bytes of a picture as the protocol has them: their number before them.
            tensors, datas = "", [(path.stat().st_size).to_bytes(4, "little") + path.read_bytes() for path in goldens]
        else:
            tensors, datas = graph(archive, spec, goldens, target / "model.onnx")
            shutil.rmtree(archive)
    except BaseException:
        shutil.rmtree(target)
        raise
    goldens = goldens[: len(datas)]
    for path, data in zip(goldens, datas, strict=True):
        (folder / "warmup" / path.name).write_bytes(data)
    if spec.labels:
        (folder / "labels.txt").write_text("".join(f"{' '.join(each.split())}\n" for each in spec.labels), "utf-8")
    (folder / "config.pbtxt").write_text(
        _config(spec, numbers, graph is None, [path.name for path in goldens], tensors), "utf-8"
    )
    return folder


def _config(spec: ModelSpec, numbers: Numbers, is_handler: bool, goldens: list[str], own: str) -> str:
    """Return `config.pbtxt`; the warm-up sends each golden picture alone, and a full batch of the first."""
    key, kind, dims = ("picture", "STRING", [1]) if is_handler else (PIXELS, "FP32", [3, *spec.geometry.shape])
    first = f"data_type: TYPE_{kind} {_repeated('dims', dims)}"
    tensors = _HANDLER.format(first=first) if is_handler else f'input {{ name: "{key}" {first} }}'
    name = "scores" if is_handler else spec.output
    scores = _SCORES.format(name=name, classes=len(spec.labels)) if spec.labels else ""
    full = [(file, numbers.batch_size) for file in goldens[:1]]
    sizes = dict.fromkeys([*((file, 1) for file in goldens), *full])
    return _CONFIG.format(
        name=json.dumps(spec.name),
        backend="python" if is_handler else "onnxruntime",
        numbers=numbers,
        tensors=own or f"{tensors}\n{scores}",
        place=f"kind: KIND_GPU {_repeated('gpus', numbers.gpus)}" if numbers.gpus else "kind: KIND_CPU",
        preferred=_repeated("preferred_batch_size", numbers.preferred),
        delay=1000 * numbers.delay,
        queue=f"default_queue_policy {{ max_queue_size: {numbers.queue} }}" if numbers.queue else "",
        warmups="\n".join(_WARMUP.format(file=file, size=size, key=key, first=first) for file, size in sizes),
    )


def _repeated(name: str, values: Sequence[int]) -> str:
    return " ".join(f"{name}: {value}" for value in values)
