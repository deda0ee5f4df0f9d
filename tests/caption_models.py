"""A captioning model's folder as a worker loads it, and drawn pictures."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image

from archive import caption
from archive.export import ExportRequest
from beeline.spec import Artifact, ModelSpec
from tests.captions import SIDE
from tests.conftest import write_checksums


def drawn(count: int) -> list[bytes]:
    """Return pictures of random squares, as large as the model's input, so that nothing is resized."""
    bodies = []
    for squares in np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8):
        target = io.BytesIO()
        Image.fromarray(np.kron(squares, np.ones((SIDE // 4, SIDE // 4, 1), np.uint8))).save(target, "PNG")
        bodies.append(target.getvalue())
    return bodies


def model_folder(blip: caption.Checkpoint, folder: Path, engine: str, beams: int) -> Path:
    """Write a model folder as a server unpacks it; captions have at most 12 tokens."""
    request = ExportRequest("blip", "1.0", (), blip.preprocessing, blind_to=caption.NOTICED)
    spec = caption.export(blip, request, folder, max_tokens=12, beams=beams)
    assert spec.caption is not None
    if engine == "openvino":
        words = dataclasses.replace(spec.caption, decoder=_converted(folder, spec.caption.decoder))
        spec = dataclasses.replace(spec, engine=engine, model=_converted(folder, spec.model), caption=words)
        spec.save(folder / "model_spec.json")
    write_checksums(folder, ModelSpec.load(folder))
    return folder


def _converted(folder: Path, model: Artifact) -> Artifact:
    import openvino

    files = [(folder / model.file).with_suffix(ending) for ending in (".xml", ".bin")]
    openvino.save_model(openvino.convert_model(folder / model.file), files[0], compress_to_fp16=False)
    (name, digest), (weights, second) = ((path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files)
    return Artifact(name, "openvino", digest, model.architecture, weights, second)
