"""The engine of ONNX models: ONNX Runtime, on CPUs, and on CUDA devices where its build has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from beeline.engines import Engine
from beeline.errors import ConfigError
from beeline.settings import Choice, parsed_device

INPUT = "pixels"
TENSORRT, CUDA, CPU = "TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"
# TensorRT builds its engine for a range of batches; for a batch outside it, clients would wait for another engine.
_USUAL_BATCH, _LARGEST_BATCH = 16, 64
Providers = list[tuple[str, dict[str, Any]]]


class OnnxRuntimeEngine(Engine):
    """ONNX Runtime, for one file `model.onnx` with its weights inside.

    The graph takes uint8 `[N, crop, crop, 3]` and returns float `[N, classes]`. A build of ONNX Runtime for CUDA
    devices (the package onnxruntime-gpu) runs it by TensorRT, else by CUDA. This has not been run on a device yet.
    """

    title = f"ONNX Runtime {onnxruntime.__version__}"

    def _device(self, gpu_id: int | None) -> Choice:
        available, crop = onnxruntime.get_available_providers(), self.spec.geometry.crop
        device, self._providers = choose(self.asked, available, gpu_id, crop)
        return device

    def _start(self, path: Path) -> None:
        # Builds for Linux send no telemetry; others have this switch.
        getattr(onnxruntime, "disable_telemetry_events", lambda: None)()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(self.choice["threads"].value)
        options.inter_op_num_threads = 1
        # Threads that spin while they wait take the core from other workers.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=self._providers)
        self._input = self._session.get_inputs()[0].name
        self.choice["device"] = settled(self.asked, self.choice["device"], self._session.get_providers())

    def forward(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Run the model; see `Engine.forward`."""
        return np.asarray(self._session.run(None, {self._input: pixels})[0], dtype=np.float32)


def choose(asked: str, available: Sequence[str], gpu_id: int | None, crop: int) -> tuple[Choice, Providers]:
    """Return the device, and the providers in the order in which ONNX Runtime is to try them.

    Args:
        asked: `auto`, `cpu` or `cuda[:index]`.
        available: the providers that this build of ONNX Runtime has.
        gpu_id: the device that the server assigned to this worker.
        crop: side of a picture in pixels.

    Raises:
        ConfigError: for a CUDA device where this build has no provider for one.
    """
    name, index = parsed_device(asked)
    cpu: Providers = [(CPU, {})]
    if name == "cpu":
        return Choice("cpu", "asked for"), cpu
    found = [provider for provider in (TENSORRT, CUDA) if provider in available]
    if not found:
        if name == "cuda":
            raise ConfigError(
                f"BEELINE_DEVICE is {asked!r}, and this build of ONNX Runtime runs on CPUs: use auto or cpu, or "
                "install onnxruntime-gpu in place of onnxruntime"
            )
        return Choice("cpu", "this build of ONNX Runtime runs on CPUs"), cpu
    number = (gpu_id or 0) if index is None else index
    options: dict[str, dict[str, Any]] = {
        TENSORRT: {
            "device_id": number,
            "trt_profile_min_shapes": f"{INPUT}:1x{crop}x{crop}x3",
            "trt_profile_opt_shapes": f"{INPUT}:{_USUAL_BATCH}x{crop}x{crop}x3",
            "trt_profile_max_shapes": f"{INPUT}:{_LARGEST_BATCH}x{crop}x{crop}x3",
        },
        CUDA: {"device_id": number},
    }
    by = " and ".join("TensorRT" if provider == TENSORRT else "CUDA" for provider in found)
    reason = f"this build of ONNX Runtime has {by}"
    return Choice(f"cuda:{number}", reason), [(provider, options[provider]) for provider in found] + cpu


def settled(asked: str, chosen: Choice, running: Sequence[str]) -> Choice:
    """Return the device that a session runs on: where a provider does not start, ONNX Runtime takes the next one.

    Raises:
        ConfigError: when a CUDA device was asked for and none of its providers started.
    """
    if chosen.value == "cpu" or TENSORRT in running or CUDA in running:
        return chosen
    if asked != "auto":
        raise ConfigError(
            f"BEELINE_DEVICE is {asked!r}, and ONNX Runtime's providers for CUDA devices did not start; its log says "
            "why: install the CUDA and cuDNN that it asks for, or use auto or cpu"
        )
    return Choice("cpu", "ONNX Runtime's providers for CUDA devices did not start")
