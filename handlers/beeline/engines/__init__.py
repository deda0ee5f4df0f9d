"""Engines: what the handler asks of a runtime, and the runtime that an archive is made for."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beeline.errors import ArchiveError, BeelineError, ConfigError, short
from beeline.settings import Choice, threads_of
from beeline.spec import ModelSpec

# Module, class, and the package that brings the runtime.
_ENGINES = {
    "torch": ("beeline.engines.torch", "TorchEngine", "torch"),
    "torch_compile": ("beeline.engines.torch_compile", "TorchCompileEngine", "torch"),
    "openvino": ("beeline.engines.openvino", "OpenVinoEngine", "openvino"),
    "onnxruntime": ("beeline.engines.onnxruntime", "OnnxRuntimeEngine", "onnxruntime"),
}
# Engines that never run on a CUDA device.
ON_CPUS = ("openvino",)
Inputs = Mapping[str, NDArray[Any]]


class Engine:
    """A loaded model: uint8 pictures in, scores out. Each runtime has a subclass.

    Attributes:
        title: what messages call the runtime.
        choice: engine, device, precision and threads, each with its reason, as logs, metrics and page show them.
    """

    title: str

    def __init__(
        self,
        folder: Path,
        spec: ModelSpec,
        device: str | None = None,
        threads: int | None = None,
        gpu_id: int | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        """Load the artifact in `folder` and run it once, so that no client waits for the first pass.

        Without `device` (`auto`, `cpu` or `cuda[:index]`) and `threads` it reads `BEELINE_DEVICE` and
        `BEELINE_THREADS`. `gpu_id` is the CUDA device that the server assigned to this worker.

        Raises:
            ConfigError: for a device that is not there. ArchiveError: for an artifact that does not load.
        """
        self.spec, self.environ = spec, environ
        self.asked = device or environ.get("BEELINE_DEVICE") or "auto"
        built = "as the archive was built"
        self.choice = {
            "engine": Choice(spec.engine, built),
            "device": self._device(gpu_id),
            "precision": Choice(spec.precision, built),
            "threads": threads_of(threads, environ),
        }
        self._prepare()
        try:
            self._start(folder / spec.model.file)
            self._warm_up()
        except BeelineError:
            raise
        except Exception as error:
            why = short(error, 300)
            raise ArchiveError(f"{spec.model.file} does not run on {self.title} ({why}); build it again") from error

    def forward(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Run the model: uint8 `[N, crop, crop, 3]` to float32 `[N, classes]`, for any N from 1.

        The second and further dimensions are another task's own.
        """
        raise NotImplementedError

    def program(self, path: Path, first: Inputs) -> Callable[[Inputs], list[NDArray[Any]]]:
        """Load another graph of the archive, of arrays by name to a list of arrays, and run it once, on `first`."""
        raise NotImplementedError

    def warm(self, batch_size: int) -> None:
        """Run one batch of `batch_size` pictures, so that no client waits for its first pass.

        That takes OpenVINO half as long again as the next ones, and the most memory. Smaller batches cost a client 16
        to 35 ms once (SqueezeNet), and all of them would double the start.
        """
        self.forward(np.zeros((batch_size, *self.spec.geometry.shape, 3), np.uint8))

    def _device(self, gpu_id: int | None) -> Choice:
        """Return the device for `asked`; raise `ConfigError` where it is not there."""
        raise NotImplementedError

    def _prepare(self) -> None:
        """Read the rest of the environment; raise `ConfigError` for what is impossible or missing."""

    def _start(self, path: Path) -> None:
        """Load the artifact from its file."""
        raise NotImplementedError

    def _warm_up(self) -> None:
        for count in (1, 2):
            shape = self.forward(np.zeros((count, *self.spec.geometry.shape, 3), np.uint8)).shape
            # A captioning model has no labels; its decoder takes the output, whatever its shape.
            expected = (count, len(self.spec.labels)) if self.spec.labels else (count, *shape[1:])
            if shape != expected:
                raise ValueError(f"{count} pictures gave an output of shape {shape}, not {expected}")


def runtime(name: str) -> str:
    """Return the package that an engine of this name needs."""
    return _ENGINES[name][2]


def load(folder: Path, spec: ModelSpec, **options: Any) -> Engine:
    """Load the artifact in `folder` with the engine that `spec` names; `options` are those of `Engine`.

    Raises:
        ConfigError: for a runtime that is missing or does not load. Others: as `Engine`.
    """
    module, name, package = _ENGINES[spec.engine]
    try:
        kind: type[Engine] = getattr(importlib.import_module(module), name)
    except (ImportError, OSError) as error:
        # A broken package raises OSError for a library that does not load; one that lacks another package names that.
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] != package:
            raise
        fact = "is not installed" if isinstance(error, ModuleNotFoundError) else f"does not load ({short(error)})"
        raise ConfigError(
            f"{spec.name} {spec.version} needs the engine {spec.engine}, and {package} {fact} here; install {package} "
            f"(images: --build-arg ENGINES={package}), or build the archive with --engine "
            f"{'openvino' if package == 'torch' else 'torch'}"
        ) from error
    return kind(folder, spec, **options)
