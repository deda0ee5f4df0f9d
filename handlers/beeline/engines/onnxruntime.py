"""The engine of ONNX models: ONNX Runtime, on CPUs, and on CUDA devices where its build has them.

A build for CUDA devices (the package onnxruntime-gpu) runs the model by TensorRT, else by CUDA. This has not been run
on a device yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from beeline.engines import Engine, Inputs
from beeline.errors import ConfigError
from beeline.settings import Choice, device_of

INPUT = "pixels"
TENSORRT, CUDA, CPU = "TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"
# TensorRT builds its engine for a range of batches; clients would wait for another engine at a batch outside it.
_USUAL_BATCH, _LARGEST_BATCH = 16, 64
Providers = list[tuple[str, dict[str, Any]]]


class OnnxRuntimeEngine(Engine):
    """ONNX Runtime, for one file `model.onnx` with its weights inside."""

    title = f"ONNX Runtime {onnxruntime.__version__}"

    def _device(self, gpu_id: int | None) -> Choice:
        available, shape = onnxruntime.get_available_providers(), self.spec.geometry.shape
        device, self._providers = choose(self.asked, available, gpu_id, shape)
        return device

    def _start(self, path: Path) -> None:
        # Builds for Linux send no telemetry; others have this switch.
        getattr(onnxruntime, "disable_telemetry_events", lambda: None)()
        self._session = self._session_of(path, self._providers)
        self._input = self._session.get_inputs()[0].name
        self.choice["device"] = settled(self.asked, self.choice["device"], self._session.get_providers())

    def program(self, path: Path, first: Inputs) -> Callable[[Inputs], list[NDArray[Any]]]:
        """Load another graph; see `Engine.program`."""
        # TensorRT would build an engine for each of the many shapes.
        session = self._session_of(path, [each for each in self._providers if each[0] != TENSORRT])
        session.run(None, dict(first))
        return lambda inputs: list(session.run(None, dict(inputs)))

    def _session_of(self, path: Path, providers: Providers) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(self.choice["threads"].value)
        options.inter_op_num_threads = 1
        # Threads that spin while they wait take the core from other workers.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(str(path), options, providers=providers)

    def forward(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Run the model; see `Engine.forward`."""
        return np.asarray(self._session.run(None, {self._input: pixels})[0], dtype=np.float32)


def choose(
    asked: str, available: Sequence[str], gpu_id: int | None, shape: tuple[int, int]
) -> tuple[Choice, Providers]:
    """Return the device, and the providers in the order in which ONNX Runtime tries them; see `device_of`.

    `available` are the providers that this build has, `shape` is a picture's height and width.
    """
    names = [name for name in (TENSORRT, CUDA) if name in available]
    kinds = " and ".join(name.removesuffix("ExecutionProvider") for name in names)
    fact = f"this build of ONNX Runtime runs on {kinds or 'CPUs'}"
    fix = ", or install onnxruntime-gpu in place of onnxruntime"
    device = device_of(asked, gpu_id, None if names else 0, fact, fix)
    providers: Providers = [(CPU, {})]
    if device.value == "cpu":
        return device, providers
    number = int(device.value.partition(":")[2])
    batches = {"min": 1, "opt": _USUAL_BATCH, "max": _LARGEST_BATCH}
    shapes = {f"trt_profile_{key}_shapes": f"{INPUT}:{batch}x{shape[0]}x{shape[1]}x3" for key, batch in batches.items()}
    options: dict[str, dict[str, Any]] = {TENSORRT: {"device_id": number, **shapes}, CUDA: {"device_id": number}}
    return device, [(name, options[name]) for name in names] + providers


def settled(asked: str, chosen: Choice, running: Sequence[str]) -> Choice:
    """Return the device that a session runs on: if a provider does not start, ONNX Runtime takes the next one.

    Raises:
        ConfigError: when a CUDA device was asked for and none of its providers started.
    """
    if chosen.value == "cpu" or TENSORRT in running or CUDA in running:
        return chosen
    fact = "ONNX Runtime's providers for CUDA devices did not start"
    if asked != "auto":
        raise ConfigError(
            f"BEELINE_DEVICE is {asked!r}, and {fact}; its log says why: install the CUDA and cuDNN that it asks for, "
            "or use auto or cpu"
        )
    return Choice("cpu", fact)
