"""The classifier that every peer serves: as its documentation would load it, or with Beeline's engine.

Runs in the peers' own environments, beside their `server.py`; the comparison sets the environment below.
"""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image


@dataclass(frozen=True)
class Settings:
    """What the comparison asks of a server: its port, and batching and workers; the delay in seconds."""

    port: int
    batch_size: int
    workers: int
    delay: float


def settings() -> Settings:
    """Read `PEER_PORT`, `PEER_BATCH_SIZE`, `PEER_WORKERS` and `PEER_DELAY_MS`."""
    port, batch_size, workers, delay = (
        int(os.environ[f"PEER_{name}"]) for name in ("PORT", "BATCH_SIZE", "WORKERS", "DELAY_MS")
    )
    return Settings(port, batch_size, workers, delay / 1000)


def load() -> Documented | Beeline:
    """Return the classifier in the folder `PEER_MODEL`, with the engine that `PEER_ENGINE` names.

    Both turn bytes into what `predict` takes, and a batch of that into `{label: probability}`, best first.
    """
    folder = Path(os.environ["PEER_MODEL"])
    classifier = Beeline(folder) if os.environ["PEER_ENGINE"] == "beeline" else Documented(folder)
    # What the row says of threads is what this process really has.
    Path(os.environ["PEER_THREADS_FILE"]).write_text(str(torch.get_num_threads()), encoding="utf-8")
    return classifier


class Documented:
    """TorchScript in fp32 behind torchvision's transforms, as tutorials have it."""

    def __init__(self, folder: Path) -> None:
        # Beeline's own rows need no torchvision.
        from torchvision import transforms

        told = json.loads((folder / "documented.json").read_text(encoding="utf-8"))
        self.labels: list[str] = told["labels"]
        self.model = torch.jit.load(str(folder / "documented.pt"), map_location="cpu").eval()
        self.transform = transforms.Compose(
            [
                transforms.Resize(told["resize"], transforms.InterpolationMode(told["interpolation"])),
                transforms.CenterCrop(told["crop"]),
                transforms.ToTensor(),
                transforms.Normalize(told["mean"], told["std"]),
            ]
        )

    def decode(self, data: bytes) -> Any:
        """Return float32 `[3, crop, crop]`."""
        return self.transform(Image.open(io.BytesIO(data)).convert("RGB"))

    def predict(self, pictures: Any) -> list[dict[str, float]]:
        """Classify tensors, a list of them or one stacked; the best five labels."""
        batch = pictures if isinstance(pictures, torch.Tensor) else torch.stack([torch.as_tensor(p) for p in pictures])
        with torch.inference_mode():
            rows = torch.softmax(self.model(batch), dim=1)
        best, classes = torch.topk(rows, min(5, rows.shape[1]), dim=1)
        return [
            {self.labels[int(k)]: float(p) for p, k in zip(row, which, strict=True)}
            for row, which in zip(best, classes, strict=True)
        ]


class Beeline:
    """The archive's model on Beeline's decoder and engine."""

    def __init__(self, folder: Path) -> None:
        from beeline import engines
        from beeline.spec import ModelSpec

        self.spec = ModelSpec.load(folder)
        self.engine = engines.load(folder, self.spec, device="cpu")

    def decode(self, data: bytes) -> Any:
        """Return uint8 `[crop, crop, 3]`."""
        from beeline import pixels

        return pixels.decode(data, self.spec.geometry)

    def predict(self, pictures: Any) -> list[dict[str, float]]:
        """Classify arrays, a list of them or one stacked; as many labels as the archive says."""
        import numpy as np

        from beeline.answer import probabilities, top_labels

        rows = probabilities(self.engine.forward(np.ascontiguousarray(pictures)), self.spec.output)
        return [dict(top_labels(row, self.spec)) for row in rows]
