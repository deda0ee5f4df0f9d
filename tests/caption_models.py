"""A captioning model's folder as a worker loads it, and drawn pictures."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from archive import caption
from archive.export import ExportRequest
from archive.variants import Variant
from archive.variants import caption as variants
from archive.variants.agreement import Gate
from beeline.spec import ModelSpec
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
    export = folder.with_name("onnx") if engine == "openvino" else folder
    caption.export(blip, request, export, max_tokens=12, beams=beams)
    if engine == "openvino":
        variants.make(export, folder, Variant(engine, "fp32"), None, Gate())
    write_checksums(folder, ModelSpec.load(folder))
    return folder
