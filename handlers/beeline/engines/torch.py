"""The engine of exported programs and TorchScript files: PyTorch, on CPUs and CUDA devices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beeline.engines import Engine
from beeline.engines.cuda_graph import CudaGraphs
from beeline.errors import ArchiveError, ConfigError
from beeline.settings import Choice, parsed_device
from beeline.spec import ModelSpec

_COMPUTED_IN = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchEngine(Engine):
    """PyTorch on the CPU or a CUDA device, for exported programs and TorchScript files.

    The graph takes uint8 `[N, crop, crop, 3]` and returns float `[N, classes]`. In bf16 and fp16 the fp32 file is
    computed under autocast. Autocast sees every operator as it is called, so it works for exported programs and
    TorchScript, which cannot be rewritten into another type (their casts to float32 are in the graph), and it keeps in
    fp32 what needs to be.

    The parts for CUDA devices have not been run on one yet.
    """

    title = f"PyTorch {torch.__version__}"

    def _device(self, gpu_id: int | None) -> Choice:
        return _device(self.asked, gpu_id)

    def _prepare(self) -> None:
        self._on = torch.device(self.choice["device"].value)
        self._dtype = _dtype(self.spec, self._on)
        self._graphs = _graphs(self.environ) and self._on.type == "cuda"
        torch.set_num_threads(int(self.choice["threads"].value))

    def forward(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Run the model; see `Engine.forward`."""
        with torch.inference_mode():
            output = self.on_device(torch.from_numpy(pixels).to(self._on))
            return np.asarray(output.float().cpu().numpy())

    def on_device(self, pixels: Tensor) -> Tensor:
        """Run the model on pictures that are on its device: uint8 `[N, crop, crop, 3]` to `[N, classes]`, also there.

        On a CUDA device the work is queued when this returns.

        Raises:
            RuntimeError: as PyTorch raises it.
        """
        with torch.inference_mode():
            return self._run(pixels)

    def _start(self, path: Path) -> None:
        self._model = self._load(path)
        self._run = self._compute
        if self._graphs:
            self._warm_up()
            with torch.inference_mode():
                self._run = CudaGraphs(self._compute, self._on, self.spec.geometry.crop)

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
            # The graph passes pictures in this order; filters in another order would be converted at each pass.
            model = model.to(memory_format=torch.channels_last)
        if self._dtype is not None:
            _narrow(model, self._dtype)
        return model


def _narrow(model: Any, dtype: torch.dtype) -> None:
    """Convert filters and matrices once; autocast would do so again at each pass.

    Vectors stay in fp32: biases are small, and a normalisation needs its mean and variance in full precision.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.ndim >= 2:
                parameter.data = parameter.data.to(dtype)


def _dtype(spec: ModelSpec, device: torch.device) -> torch.dtype | None:
    if spec.precision not in _COMPUTED_IN:
        raise ArchiveError(
            f"{spec.name} {spec.version} is {spec.engine} {spec.precision}; PyTorch computes in "
            f"{', '.join(_COMPUTED_IN)} here: build it again with one of them as --precision"
        )
    if spec.precision == "fp16" and device.type == "cpu":
        raise ConfigError(
            f"{spec.name} {spec.version} computes in fp16, which is for CUDA devices, and this worker runs on "
            f"{device}: run it on a CUDA device, or build the archive with --precision bf16"
        )
    return _COMPUTED_IN[spec.precision]


def _graphs(environ: Mapping[str, str]) -> bool:
    asked = environ.get("BEELINE_CUDA_GRAPHS") or "off"
    if asked not in ("on", "off"):
        raise ConfigError(f"BEELINE_CUDA_GRAPHS is {asked!r}; allowed: on, off")
    return asked == "on"


def _device(asked: str, gpu_id: int | None) -> Choice:
    name, index = parsed_device(asked)
    if name == "auto":
        if torch.cuda.is_available():
            return Choice(f"cuda:{gpu_id or 0}", "a CUDA device is there")
        return Choice("cpu", "no CUDA device is there")
    if name == "cuda" and (index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"BEELINE_DEVICE is {asked!r}; this machine has {torch.cuda.device_count()} CUDA devices: use auto"
        )
    return Choice(asked if name == "cpu" else f"cuda:{(gpu_id or 0) if index is None else index}", "asked for")
