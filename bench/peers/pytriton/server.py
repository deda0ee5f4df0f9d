"""PyTriton, as its ResNet examples have it: Triton gathers batches, one inference callable an instance."""

from __future__ import annotations

import logging
from typing import Any

import classifier
import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

settings = classifier.settings()


class Infer:
    """One instance: a model of its own."""

    def __init__(self) -> None:
        self.classifier = classifier.load()

    @batch
    def __call__(self, image: Any) -> dict[str, Any]:
        """Decode and classify bytes `[N, 1]`; the best label of each, `[N, 1]`."""
        answers = self.classifier.predict([self.classifier.decode(row[0]) for row in image])
        return {"label": np.array([[next(iter(answer)).encode()] for answer in answers])}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    here = TritonConfig(
        http_address="127.0.0.1", http_port=settings.port, allow_grpc=False, allow_metrics=False, model_repository=None
    )
    with Triton(config=here) as triton:
        triton.bind(
            model_name="classifier",
            infer_func=[Infer() for _ in range(settings.workers)],
            inputs=[Tensor(name="image", dtype=bytes, shape=(1,))],
            outputs=[Tensor(name="label", dtype=bytes, shape=(1,))],
            config=ModelConfig(
                max_batch_size=settings.batch_size,
                batcher=DynamicBatcher(max_queue_delay_microseconds=int(1e6 * settings.delay)),
            ),
            strict=True,
        )
        triton.serve()
