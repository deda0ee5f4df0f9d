"""The engine of exported programs and TorchScript files: PyTorch, on CPUs and CUDA devices."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beeline.engines import choices, warm_up
from beeline.engines.cuda_graph import CudaGraphs
from beeline.errors import ArchiveError, ConfigError
from beeline.settings import Choice, parsed_device, threads_of
from beeline.spec import ModelSpec

_COMPUTED_IN = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchEngine:
    """PyTorch on the CPU or a CUDA device, for exported programs and TorchScript files.

    The graph takes uint8 `[N, crop, crop, 3]` and returns float `[N, classes]`. In bf16 and fp16 the file is the fp32
    one, computed under autocast, which sees every operator as it is called: so it serves exported programs and
    TorchScript alike, neither of which can be rewritten into another type (their casts to float32 are in the graph),
    and it leaves in fp32 what needs to be.

    What concerns CUDA devices has not been run on one yet.
    """

    def __init__(
        self,
        folder: Path,
        spec: ModelSpec,
        device: str | None = None,
        threads: int | None = None,
        gpu_id: int | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        """Load the artifact and run it once, so that no client pays for the first pass.

        Args:
            folder: where the artifact lies.
            spec: names the file, its format and the precision.
            device: `auto`, `cpu` or `cuda[:index]`; None reads `BEELINE_DEVICE`.
            threads: intra-op threads; None reads `BEELINE_THREADS`.
            gpu_id: the device that the server assigned to this worker, for `auto`.
            environ: the environment to read, for tests; `BEELINE_CUDA_GRAPHS=on` records CUDA graphs.

        Raises:
            ConfigError: for a device that is not there, or none that computes in this precision.
            ArchiveError: for an artifact that does not load.
        """
        self.spec = spec
        chosen = _device(device or environ.get("BEELINE_DEVICE") or "auto", gpu_id)
        self.choice = choices(spec, chosen, threads_of(threads, environ))
        self._device = torch.device(chosen.value)
        self._dtype = _dtype(spec, self._device)
        graphs = _graphs(environ) and self._device.type == "cuda"
        torch.set_num_threads(int(self.choice["threads"].value))
        self._prepare(environ)
        try:
            self._start(folder / spec.model.file, graphs)
        except Exception as error:
            why = " ".join(str(error).split())[:300]
            raise ArchiveError(
                f"{spec.model.file} does not run as {spec.model.format} on {chosen.value} ({why}); build it again"
            ) from error

    def forward(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Run the model: uint8 `[N, crop, crop, 3]` to float32 `[N, classes]`.

        Raises:
            RuntimeError: as PyTorch raises it.
        """
        with torch.inference_mode():
            output = self.on_device(torch.from_numpy(pixels).to(self._device))
            return np.asarray(output.float().cpu().numpy())

    def on_device(self, pixels: Tensor) -> Tensor:
        """Run the model on what is on its device already: uint8 `[N, crop, crop, 3]` to `[N, classes]`, there too.

        On a CUDA device the work is queued when this returns.

        Raises:
            RuntimeError: as PyTorch raises it.
        """
        with torch.inference_mode():
            return self._run(pixels)

    def _prepare(self, environ: Mapping[str, str]) -> None:
        """Check what the model needs to run, before it is loaded; a subclass has more to check.

        Raises:
            ConfigError: naming what is missing.
        """

    def _start(self, path: Path, graphs: bool) -> None:
        self._model = self._load(path)
        self._run = self._compute
        warm_up(self.forward, self.spec)
        if graphs:
            with torch.inference_mode():
                self._run = CudaGraphs(self._compute, self._device, self.spec.geometry.crop)
            warm_up(self.forward, self.spec)

    def _compute(self, pixels: Tensor) -> Tensor:
        # The cache of converted weights lives no longer than one pass, and `_narrow` has converted them.
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None, cache_enabled=False):
            scores: Tensor = self._model(pixels)
        return scores

    def _load(self, path: Path) -> Any:
        if self.spec.model.format == "torchscript":
            model = torch.jit.load(str(path), map_location=self._device).eval()  # type: ignore[no-untyped-call]
        else:
            program = torch.export.load(path)
            if self._device.type != "cpu":
                from torch.export.passes import move_to_device_pass

                program = move_to_device_pass(program, self._device)
            model = program.module()
        if self._device.type != "cpu":
            # The graph hands over pictures in this order; filters in another would be turned round at each pass.
            model = model.to(memory_format=torch.channels_last)
        if self._dtype is not None:
            _narrow(model, self._dtype)
        return model


def _narrow(model: Any, dtype: torch.dtype) -> None:
    """Convert filters and matrices once; autocast would do so again at each pass.

    Vectors stay: biases are small, and the mean and variance of a normalisation are needed whole.
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
