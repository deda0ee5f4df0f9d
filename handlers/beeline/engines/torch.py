"""The engine of exported programs and TorchScript files: PyTorch, on CPUs and CUDA devices.

The parts for CUDA devices have not been run on one yet (`make test-gpu` does).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beeline.engines import Engine
from beeline.errors import ArchiveError, ConfigError
from beeline.settings import Choice, device_of

_COMPUTED_IN = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Sizes of the batches that CUDA graphs are recorded for.
BUCKETS = (1, 2, 4, 8, 16, 32, 64)


class TorchEngine(Engine):
    """PyTorch on the CPU or a CUDA device.

    In bf16 and fp16 the fp32 file runs under autocast. Exported programs and TorchScript cannot be rewritten into
    another type, since their graphs cast to float32; autocast sees each operator as it is called, and keeps in fp32
    what must be.
    """

    title = f"PyTorch {torch.__version__}"

    def _device(self, gpu_id: int | None) -> Choice:
        # NVML counts devices that this PyTorch cannot use, as with an old driver.
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        fact = f"CUDA devices here: {devices}" if devices else "no CUDA device is there"
        return device_of(self.asked, gpu_id, devices, fact)

    def _prepare(self) -> None:
        spec, self._on = self.spec, torch.device(self.choice["device"].value)
        if spec.precision not in _COMPUTED_IN:
            raise ArchiveError(
                f"{spec.name} {spec.version} is {spec.engine} {spec.precision}; PyTorch computes in "
                f"{', '.join(_COMPUTED_IN)} here: build it again with one of them as --precision"
            )
        if spec.precision == "fp16" and self._on.type == "cpu":
            raise ConfigError(
                f"{spec.name} {spec.version} computes in fp16, which is for CUDA devices, and this worker runs on "
                "the CPU: run it on a CUDA device, or build the archive with --precision bf16"
            )
        self._dtype = _COMPUTED_IN[spec.precision]
        graphs = self.environ.get("BEELINE_CUDA_GRAPHS") or "off"
        if graphs not in ("on", "off"):
            raise ConfigError(f"BEELINE_CUDA_GRAPHS is {graphs!r}; allowed: on, off")
        self._graphs = graphs == "on" and self._on.type == "cuda"
        torch.set_num_threads(int(self.choice["threads"].value))

    def forward(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Run the model; see `Engine.forward`."""
        with torch.inference_mode():
            output = self.on_device(torch.from_numpy(pixels).to(self._on))
            return np.asarray(output.float().cpu().numpy())

    def on_device(self, pixels: Tensor) -> Tensor:
        """Run the model on pictures that are on its device: uint8 `[N, crop, crop, 3]` to `[N, classes]`, also there.

        On a CUDA device the work is queued when this returns.
        """
        with torch.inference_mode():
            return self._run(pixels)

    def _start(self, path: Path) -> None:
        self._model = self._load(path)
        self._run = self._compute
        if self._graphs:
            self._warm_up()
            with torch.inference_mode():
                self._run = CudaGraphs(self._compute, self._on, self.spec.geometry.shape)

    def _compute(self, pixels: Tensor) -> Tensor:
        # Autocast's cache of converted weights lasts for one pass, and `_narrow` has converted them.
        with torch.autocast(self._on.type, self._dtype, enabled=self._dtype is not None, cache_enabled=False):
            scores: Tensor = self._model(pixels)
        return scores

    def _load(self, path: Path) -> Any:
        if self.spec.model.format == "torchscript":
            model = torch.jit.load(str(path), map_location=self._on).eval()  # type: ignore[no-untyped-call]
        else:
            program = torch.export.load(path)
            if self._on.type != "cpu":
                from torch.export.passes import move_to_device_pass

                program = move_to_device_pass(program, self._on)
            model = program.module()
        if self._on.type != "cpu":
            # The graph passes pictures in this order; each pass would convert filters in another order.
            model = model.to(memory_format=torch.channels_last)
        if self._dtype is not None:
            _narrow(model, self._dtype)
        return model


def _narrow(model: Any, dtype: torch.dtype) -> None:
    """Convert filters and matrices once; autocast would convert them at each pass.

    Vectors stay in fp32: biases are small, and a normalisation needs its mean and variance in full precision.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.ndim >= 2:
                parameter.data = parameter.data.to(dtype)


def by_buckets(pixels: Tensor, replay: Callable[[int, Tensor], Tensor], buckets: Sequence[int] = BUCKETS) -> Tensor:
    """Run a batch of any size, uint8 `[N, crop, crop, 3]`, through recordings: `[N, classes]`.

    The batch is cut into pieces of the largest bucket; the rest goes into the smallest bucket that holds it. `replay`
    takes a bucket and at most as many pictures; it returns `[bucket, classes]` in memory that the next replay
    overwrites. `buckets` are in ascending order.
    """
    parts = []
    for piece in torch.split(pixels, buckets[-1]):
        bucket = next(size for size in buckets if size >= len(piece))
        parts.append(replay(bucket, piece)[: len(piece)].clone())
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class CudaGraphs:
    """A model's forward pass, recorded once for each size of batch; call it as the model itself.

    A small network's hundred kernels take longer to launch than to run; a replay launches them all at once. It is off
    unless `BEELINE_CUDA_GRAPHS=on`, since no device has run it yet.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        device: torch.device,
        shape: tuple[int, int],
        buckets: Sequence[int] = BUCKETS,
    ) -> None:
        """Record the model once for each bucket.

        `model` takes uint8 `[N, crop, crop, 3]` on the CUDA device to `[N, classes]`, without gradients; `shape` is a
        picture's height and width in pixels, and `buckets` are in ascending order.

        Raises:
            RuntimeError: as PyTorch raises it, for a model that waits for the device, or for too little memory.
        """
        self._buckets = tuple(buckets)
        self._recorded: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        with torch.cuda.device(device):
            # Only one is replayed at a time, so they share their memory; the largest comes first and allocates enough.
            pool = torch.cuda.graph_pool_handle()
            for size in reversed(self._buckets):
                given = torch.zeros(size, *shape, 3, dtype=torch.uint8, device=device)
                side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                side.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(side):
                    # As in PyTorch's notes on CUDA graphs: libraries choose their algorithms before the capture.
                    for _ in range(3):
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
