"""A captioning model's folder as a worker loads it, drawn pictures, and what transformers writes about them."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from archive import caption
from beeline import pixels
from beeline.spec import Artifact, Caption, ModelSpec
from beeline.wordpiece import WordPiece
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


def generated(
    loaded: caption.Checkpoint, rows: NDArray[np.uint8], beams: int, prompt: str = "", most: int = 12
) -> list[tuple[tuple[int, ...], float]]:
    """Return the tokens of transformers' `generate` after the prompt, the end included, and their score."""
    ids = loaded.tokenizer(prompt, return_tensors="pt").input_ids.repeat(len(rows), 1)
    asked: dict[str, Any] = {"num_beams": beams, "max_new_tokens": most, "do_sample": False}
    made = loaded.model.generate(loaded.planes(rows), ids, **asked, return_dict_in_generate=True, output_scores=True)
    texts = [row[ids.shape[1] - 1 :] for row in made.sequences.tolist()]
    texts = [tuple(row[: row.index(3) + 1] if 3 in row else row) for row in texts]
    scores = loaded.model.text_decoder.compute_transition_scores(
        made.sequences, made.scores, getattr(made, "beam_indices", None), normalize_logits=beams == 1
    )
    return [(row, float(score[: len(row)].mean().exp())) for row, score in zip(texts, scores, strict=True)]


def model_folder(loaded: caption.Checkpoint, folder: Path, engine: str, beams: int, golden: Sequence[bytes]) -> Path:
    """Write a model folder as a server unpacks it, with what `generate` writes for the pictures `golden`."""
    caption.write(loaded, folder)
    names = (caption.ENCODER, caption.DECODER)
    if engine == "openvino":
        names = caption.to_openvino(folder, folder)
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    weights = [Path(name).with_suffix(".bin").name if engine == "openvino" else None for name in names]
    encoder, decoder = (
        Artifact(
            name, "onnx" if name.endswith("onnx") else engine, digests[name], "blip", second, digests.get(second or "")
        )
        for name, second in zip(names, weights, strict=True)
    )
    words = Caption(decoder, caption.TOKENIZER, digests[caption.TOKENIZER], 5, 3, 0, 12, beams, positions=32)
    geometry = loaded.preprocessing.geometry
    spec = ModelSpec("blip", "1.0", (), geometry, encoder, pixels.GEOMETRY, engine, task="caption", caption=words)
    (folder / "golden").mkdir()
    expected = []
    rows = np.stack([pixels.decode(data, geometry) for data in golden])
    for number, (data, (ids, score)) in enumerate(zip(golden, generated(loaded, rows, beams), strict=True)):
        (folder / "golden" / f"{number}.png").write_bytes(data)
        text, digest = WordPiece(folder / caption.TOKENIZER).decode(ids), hashlib.sha256(data).hexdigest()
        expected.append({"file": f"{number}.png", "sha256": digest, "top": [[text, score]], "ids": ids})
    (folder / "golden" / "expected.json").write_text(json.dumps({"schema": 1, "pictures": expected}))
    spec.save(folder / "model_spec.json")
    write_checksums(folder, spec)
    return folder
