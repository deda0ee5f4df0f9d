"""The engine of exported programs and TorchScript files: PyTorch, on CPUs and CUDA devices."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from beeline.engine import Choice, choices, threads_of, warm_up
from beeline.errors import ArchiveError, ConfigError
from beeline.spec import ModelSpec


class TorchEngine:
    """PyTorch on the CPU or a CUDA device, for exported programs and TorchScript files.

    The graph takes uint8 `[N, crop, crop, 3]` and returns float `[N, classes]`.
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
            spec: names the file and its format.
            device: `auto`, `cpu` or `cuda[:index]`; None reads `BEELINE_DEVICE`.
            threads: intra-op threads; None reads `BEELINE_THREADS`.
            gpu_id: the device that the server assigned to this worker, for `auto`.
            environ: the environment to read, for tests.

        Raises:
            ConfigError: for a device that is not there. ArchiveError: for an artifact that does not load.
        """
        self.spec = spec
        chosen = _device(device or environ.get("BEELINE_DEVICE") or "auto", gpu_id)
        self.choice = choices(spec, chosen, threads_of(threads, environ))
        torch.set_num_threads(int(self.choice["threads"].value))
        self._device = torch.device(chosen.value)
        try:
            self._model = self._load(folder / spec.model.file)
            warm_up(self.forward, spec)
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
            output = self._model(torch.from_numpy(pixels).to(self._device))
            return np.asarray(output.float().cpu().numpy())

    def _load(self, path: Path) -> Any:
        if self.spec.model.format == "torchscript":
            return torch.jit.load(str(path), map_location=self._device).eval()  # type: ignore[no-untyped-call]
        program = torch.export.load(path)
        if self._device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, self._device)
        return program.module()


def _device(asked: str, gpu_id: int | None) -> Choice:
    if asked == "auto":
        if torch.cuda.is_available():
            return Choice(f"cuda:{gpu_id or 0}", "a CUDA device is there")
        return Choice("cpu", "no CUDA device is there")
    name, _, index = asked.partition(":")
    if name not in ("cpu", "cuda") or (index and not index.isdigit()) or (name == "cpu" and index):
        raise ConfigError(f"BEELINE_DEVICE is {asked!r}; allowed: auto, cpu, cuda or cuda:<index>")
    if name == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"BEELINE_DEVICE is {asked!r}; this machine has {torch.cuda.device_count()} CUDA devices: use auto"
        )
    return Choice(asked if name == "cpu" else f"cuda:{index or gpu_id or 0}", "asked for")
