"""PyTriton's ResNet examples: Triton's dynamic batcher, 32 pictures, 5 ms, two instances."""

import logging
from typing import Any

import classifier
import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig


class Infer:
    """One instance with a model of its own."""

    def __init__(self) -> None:
        self.model = classifier.load()

    @batch
    def __call__(self, image: Any) -> dict[str, Any]:
        """Classify bytes `[N, 1]`; return the best label of each, `[N, 1]`."""
        answers = self.model.predict([self.model.decode(row[0]) for row in image])
        return {"label": np.array([[next(iter(answer)).encode()] for answer in answers])}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    settings = classifier.settings()
    batcher = DynamicBatcher(max_queue_delay_microseconds=1000 * settings.max_batch_delay)
    config = TritonConfig(
        http_address="127.0.0.1", http_port=settings.port, allow_grpc=False, allow_metrics=False, model_repository=None
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name="classifier",
            infer_func=[Infer() for _ in range(settings.workers)],
            inputs=[Tensor(name="image", dtype=bytes, shape=(1,))],
            outputs=[Tensor(name="label", dtype=bytes, shape=(1,))],
            config=ModelConfig(max_batch_size=settings.batch_size, batcher=batcher),
            strict=True,
        )
        triton.serve()
