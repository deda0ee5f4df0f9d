"""BentoML, as its page on adaptive batching has it: a batchable API over uploaded pictures, worker processes."""

# No postponed annotations here: BentoML reads them.
from pathlib import Path
from typing import Any

import bentoml
import classifier
from PIL.Image import Image

settings = classifier.settings()
batches = {"batchable": True, "max_batch_size": settings.batch_size, "max_latency_ms": int(1000 * settings.delay)}


@bentoml.service(workers=settings.workers, traffic={"timeout": 60})
class Classifier:
    """One model a worker."""

    def __init__(self) -> None:
        self.classifier: Any = classifier.load()

    @bentoml.api(**batches)
    def classify(self, images: list[Image]) -> list[dict[str, float]]:
        """Classify pictures that BentoML opened."""
        return self.classifier.predict([self.classifier.transform(image.convert("RGB")) for image in images])

    @bentoml.api(**batches)
    def classify_files(self, files: list[Path]) -> list[dict[str, float]]:
        """Classify uploaded files with a decoder of one's own."""
        return self.classifier.predict([self.classifier.decode(file.read_bytes()) for file in files])
