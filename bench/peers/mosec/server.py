"""Mosec, as its ResNet example has it: a stage that decodes, a stage that infers in batches."""

from __future__ import annotations

from typing import Any

import classifier
from mosec import Server, ValidationError, Worker

settings = classifier.settings()


class Preprocess(Worker):
    """Decodes one picture."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = classifier.load()

    def deserialize(self, data: bytes) -> bytes:
        """Take the body as it is, instead of JSON."""
        return data

    def forward(self, data: bytes) -> Any:
        """Decode it; what is no picture gets its 422."""
        try:
            return self.classifier.decode(data)
        except Exception as error:
            raise ValidationError(f"cannot decode as image data: {error}") from error


class Inference(Worker):
    """Classifies a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = classifier.load()

    def forward(self, data: list[Any]) -> list[dict[str, float]]:
        """Classify; one answer a request."""
        return self.classifier.predict(data)


if __name__ == "__main__":
    server = Server()
    server.append_worker(Preprocess, num=settings.workers)
    server.append_worker(
        Inference, num=settings.workers, max_batch_size=settings.batch_size, max_wait_time=int(1000 * settings.delay)
    )
    server.run()
