"""Engines: what the handler asks of a runtime, and the one that an archive is made for."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from beeline.errors import ConfigError
from beeline.settings import Choice
from beeline.spec import ModelSpec


class Engine(Protocol):
    """A loaded model: uint8 pictures in, scores out; `choice` is what `choices` returned for it."""

    choice: dict[str, Choice]

    def forward(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Run the model: uint8 `[N, crop, crop, 3]` to float32 `[N, classes]`, for any N from 1."""


# Module, class, and the package that brings the runtime.
_ENGINES = {
    "torch": ("beeline.engines.torch", "TorchEngine", "torch"),
    "torch_compile": ("beeline.engines.torch_compile", "TorchCompileEngine", "torch"),
    "openvino": ("beeline.engines.openvino", "OpenVinoEngine", "openvino"),
    "onnxruntime": ("beeline.engines.onnxruntime", "OnnxRuntimeEngine", "onnxruntime"),
}


# What runs on no CUDA device, whatever is there.
ON_CPUS = ("openvino",)


def runtime(name: str) -> str:
    """Return the package that an engine of this name needs."""
    return _ENGINES[name][2]


def load(
    folder: Path,
    spec: ModelSpec,
    device: str | None = None,
    threads: int | None = None,
    gpu_id: int | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Engine:
    """Load the artifact on the engine that its spec names, and run it once.

    Args:
        folder: where the artifact lies.
        spec: names the engine, the file and its format.
        device: `auto`, `cpu` or `cuda[:index]`; None reads `BEELINE_DEVICE`.
        threads: of one forward pass; None reads `BEELINE_THREADS`.
        gpu_id: the device that the server assigned to this worker, for `auto`.
        environ: the environment to read, for tests.

    Raises:
        ConfigError: for a runtime or a device that is not there.
        ArchiveError: for an artifact that does not load.
    """
    module, name, package = _ENGINES[spec.engine]
    try:
        made: Callable[..., Engine] = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ConfigError(
            f"{spec.name} {spec.version} is made for the engine {spec.engine}, which is not installed here; install "
            f"{package}, or build the archive with --engine torch"
        ) from error
    return made(folder, spec, device=device, threads=threads, gpu_id=gpu_id, environ=environ)


def choices(spec: ModelSpec, device: Choice, threads: Choice) -> dict[str, Choice]:
    """Return engine, device, precision and threads, each with its reason, as logs, metrics and page show them."""
    built = "as the archive was built"
    return {
        "engine": Choice(spec.engine, built),
        "device": device,
        "precision": Choice(spec.precision, built),
        "threads": threads,
    }


def warm_up(forward: Callable[[NDArray[np.uint8]], NDArray[np.float32]], spec: ModelSpec) -> None:
    """Run one and two black pictures, so that no client pays for the first pass.

    Raises:
        ValueError: for an output of another shape than the labels ask for.
    """
    size, classes = spec.geometry.crop, len(spec.labels)
    for count in (1, 2):
        shape = forward(np.zeros((count, size, size, 3), np.uint8)).shape
        if shape != (count, classes):
            raise ValueError(f"{count} pictures gave an output of shape {shape}, not {(count, classes)}")
