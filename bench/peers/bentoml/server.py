"""BentoML's page on adaptive batching: a batchable API, 32 pictures, a worker a core, no 503 for being late."""

from pathlib import Path
from typing import Any

import bentoml
import classifier
from PIL.Image import Image

settings = classifier.settings()
# BentoML opens an `Image` itself; our decoder takes the file.
Picture = Path if settings.engine == "beeline" else Image


@bentoml.service(workers=settings.workers, traffic={"timeout": 60})
class Classifier:
    """One model a worker."""

    def __init__(self) -> None:
        self.model: Any = classifier.load()

    @bentoml.api(batchable=True, max_batch_size=settings.batch_size, max_latency_ms=settings.max_batch_delay)
    def classify(self, images: list[Picture]) -> list[dict[str, float]]:
        if Picture is Path:
            return self.model.predict([self.model.decode(image.read_bytes()) for image in images])
        return self.model.predict([self.model.transform(image.convert("RGB")) for image in images])
