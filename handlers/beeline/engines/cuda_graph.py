"""CUDA graphs: one recording of the forward pass for each size of batch, replayed instead of launched.

A small network's hundred kernels take longer to launch than to run; a replay launches them all at once. A recording
is of one size, so a batch is padded to the next one that was recorded.

Nothing here that needs a CUDA device has been run on one yet: `make test-gpu` is to do that. So it is off until
`BEELINE_CUDA_GRAPHS=on` asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
# What PyTorch's own notes on CUDA graphs run before a capture, so that libraries have chosen their algorithms.
_WARM_UP = 3


@dataclass(frozen=True)
class Piece:
    """Pictures `start` to `stop` of a batch, which the recording for `bucket` pictures takes."""

    start: int
    stop: int
    bucket: int


def pieces(count: int, buckets: Sequence[int] = BUCKETS) -> list[Piece]:
    """Split a batch: as often as it goes into the largest bucket, what is left into the smallest that holds it.

    Args:
        count: pictures, 1 or more.
        buckets: sizes in ascending order.
    """
    largest = buckets[-1]
    found = []
    for start in range(0, count, largest):
        left = min(largest, count - start)
        found.append(Piece(start, start + left, next(size for size in buckets if size >= left)))
    return found


def by_buckets(pixels: Tensor, replay: Callable[[int, Tensor], Tensor], buckets: Sequence[int] = BUCKETS) -> Tensor:
    """Run a batch of any size, uint8 `[N, crop, crop, 3]`, through recordings: `[N, classes]`.

    Args:
        pixels: the batch.
        replay: takes a bucket and at most as many pictures; returns `[bucket, classes]` in memory of its own, which
            the next replay overwrites.
        buckets: sizes in ascending order.
    """
    parts = []
    for piece in pieces(len(pixels), buckets):
        scores = replay(piece.bucket, pixels[piece.start : piece.stop])
        parts.append(scores[: piece.stop - piece.start].clone())
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class CudaGraphs:
    """A model's recordings on one CUDA device; call it as the model itself."""

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        device: torch.device,
        crop: int,
        buckets: Sequence[int] = BUCKETS,
    ) -> None:
        """Record the model once for each bucket.

        Args:
            model: uint8 `[N, crop, crop, 3]` on `device` to `[N, classes]`, without gradients.
            device: a CUDA device.
            crop: side of a picture in pixels.
            buckets: sizes in ascending order.

        Raises:
            RuntimeError: as PyTorch raises it, for a model that waits for the device or has not the memory.
        """
        self._buckets = tuple(buckets)
        self._recorded: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        with torch.cuda.device(device):
            # One at a time is replayed, so they share their memory; the largest is first and makes enough of it.
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
        # Behind them lie pictures of an earlier batch; no answer depends on a neighbour, and theirs are cut off.
        given[: len(pixels)].copy_(pixels)
        graph.replay()
        return taken
