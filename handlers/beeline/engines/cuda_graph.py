"""CUDA graphs: the forward pass is recorded once for each size of batch, and replayed.

A small network's hundred kernels take longer to launch than to run; a replay launches them all at once. A recording
has one size, so a batch is padded to the next recorded size.

The parts that need a CUDA device have not been run on one yet (`make test-gpu` does), so this is off unless
`BEELINE_CUDA_GRAPHS=on`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
# As in PyTorch's notes on CUDA graphs: libraries choose their algorithms before the capture.
_WARM_UP = 3


def by_buckets(pixels: Tensor, replay: Callable[[int, Tensor], Tensor], buckets: Sequence[int] = BUCKETS) -> Tensor:
    """Run a batch of any size, uint8 `[N, crop, crop, 3]`, through recordings: `[N, classes]`.

    The batch is cut into pieces of the largest bucket; the rest goes into the smallest bucket that holds it.

    Args:
        pixels: the batch, of one picture or more.
        replay: takes a bucket and at most as many pictures; returns `[bucket, classes]` in memory of its own, which
            the next replay overwrites.
        buckets: sizes in ascending order.
    """
    parts = []
    for piece in torch.split(pixels, buckets[-1]):
        bucket = next(size for size in buckets if size >= len(piece))
        parts.append(replay(bucket, piece)[: len(piece)].clone())
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class CudaGraphs:
    """A model's recordings on one CUDA device; call it as the model itself."""

    def __init__(
        self, model: Callable[[Tensor], Tensor], device: torch.device, crop: int, buckets: Sequence[int] = BUCKETS
    ) -> None:
        """Record the model once for each bucket.

        Args:
            model: uint8 `[N, crop, crop, 3]` on `device` to `[N, classes]`, without gradients.
            device: a CUDA device.
            crop: side of a picture in pixels.
            buckets: sizes in ascending order.

        Raises:
            RuntimeError: as PyTorch raises it, for a model that waits for the device, or for too little memory.
        """
        self._buckets = tuple(buckets)
        self._recorded: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        with torch.cuda.device(device):
            # Only one is replayed at a time, so they share their memory; the largest comes first and allocates enough.
            pool = torch.cuda.graph_pool_handle()
            for size in reversed(self._buckets):
                given = torch.zeros(size, crop, crop, 3, dtype=torch.uint8, device=device)
                side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                side.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(side):
                    for _ in range(_WARM_UP):
                        model(given)
                torch.cuda.current_stream(device).wait_stream(side)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    taken = model(given)
                self._recorded[size] = (graph, given, taken)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Run the batch, uint8 `[N, crop, crop, 3]` on any device: `[N, classes]` on the recordings' device."""
        return by_buckets(pixels, self._replay, self._buckets)

    def _replay(self, bucket: int, pixels: Tensor) -> Tensor:
        graph, given, taken = self._recorded[bucket]
        # The rest of `given` holds pictures of an earlier batch; their scores are cut off.
        given[: len(pixels)].copy_(pixels)
        graph.replay()
        return taken
