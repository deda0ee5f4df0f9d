"""Mosec's ResNet example: a stage that decodes, one that infers in batches of 16, two workers each."""

from typing import Any

import classifier
from mosec import Server, Worker


class Stage(Worker):
    """Each worker of each stage loads the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.model = classifier.load()


class Preprocess(Stage):
    """Decodes one picture."""

    def deserialize(self, data: bytes) -> bytes:
        # The body is no JSON.
        return data

    def forward(self, data: bytes) -> Any:
        return self.model.decode(data)


class Inference(Stage):
    """Classifies a batch."""

    def forward(self, data: list[Any]) -> list[dict[str, float]]:
        return self.model.predict(data)


if __name__ == "__main__":
    settings, server = classifier.settings(), Server()
    server.append_worker(Preprocess, num=settings.workers)
    batches = {"max_batch_size": settings.batch_size, "max_wait_time": settings.max_batch_delay}
    server.append_worker(Inference, num=settings.workers, **batches)
    server.run()
