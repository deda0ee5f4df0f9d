"""The classifier that every peer serves, in its own environment: as documented, or with Beeline's engine."""

import importlib.util
import io
import json
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image


def settings() -> SimpleNamespace:
    """Return the numbers and paths that `environ` in `bench/compare/server.py` writes."""
    return SimpleNamespace(**json.loads(os.environ["PEER"]))


class Documented:
    """TorchScript in fp32 behind torchvision's transforms, as in tutorials."""

    def __init__(self, folder: Path) -> None:
        # Beeline's own rows need no torchvision.
        from torchvision import transforms

        about = json.loads((folder / "documented.json").read_text(encoding="utf-8"))
        self.labels: list[str] = about["labels"]
        self.model = torch.jit.load(str(folder / "documented.pt"), map_location="cpu").eval()
        self.normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize(about["mean"], about["std"])])
        resize = transforms.Resize(about["resize"], transforms.InterpolationMode(about["interpolation"]))
        self.transform = transforms.Compose([resize, transforms.CenterCrop(about["crop"]), self.normalise])

    def decode(self, data: bytes) -> Any:
        """Return float32 `[3, height, width]`."""
        return self.transform(Image.open(io.BytesIO(data)).convert("RGB"))

    def predict(self, pictures: Any) -> list[dict[str, float]]:
        """Classify tensors, a list of them or one stacked; the best five labels of each."""
        batch = pictures if isinstance(pictures, torch.Tensor) else torch.stack(pictures)
        with torch.inference_mode():
            best = torch.softmax(self.model(batch), dim=1).topk(min(5, len(self.labels)))
        names = [[self.labels[index] for index in row] for row in best.indices.tolist()]
        return [dict(zip(*row, strict=True)) for row in zip(names, best.values.tolist(), strict=True)]


class Beeline:
    """The archive's model on Beeline's decoder and engine."""

    def __init__(self, folder: Path) -> None:
        from beeline import engines, pixels, spec

        self.spec = spec.ModelSpec.load(folder)
        self.engine = engines.load(folder, self.spec, device="cpu")
        # Older archives have its functions in another module.
        name = "classification" if importlib.util.find_spec("beeline.classification") else "answer"
        self.answer = importlib.import_module(f"beeline.{name}")
        # Of a picture's bytes; uint8 `[height, width, 3]`.
        self.decode = partial(pixels.decode, geometry=self.spec.geometry)

    def predict(self, pictures: Any) -> list[dict[str, float]]:
        """Classify arrays, a list of them or one stacked; as many labels as the archive says."""
        # Archives from before there was a temperature have code that takes none.
        more = {"temperature": self.spec.temperature} if getattr(self.spec, "temperature", None) else {}
        rows = self.answer.probabilities(self.engine.forward(np.ascontiguousarray(pictures)), self.spec.output, **more)
        return [dict(self.answer.top_labels(row, self.spec)) for row in rows]


def load() -> Documented | Beeline:
    """Return the classifier of the folder and the engine in `settings`.

    `decode` turns bytes into what `predict` takes; that returns `{label: probability}` for each picture, best first.
    """
    asked = settings()
    classifier = (Beeline if asked.engine == "beeline" else Documented)(Path(asked.model))
    # The row's number of threads is the number in this process.
    Path(asked.scratch, "threads").write_text(str(torch.get_num_threads()), encoding="utf-8")
    return classifier
