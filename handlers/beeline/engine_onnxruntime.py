"""The engine of ONNX models: ONNX Runtime, on CPUs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from beeline.engine import choices, on_cpu, threads_of, warm_up
from beeline.errors import ArchiveError
from beeline.spec import ModelSpec


class OnnxRuntimeEngine:
    """ONNX Runtime on the CPU, for one file `model.onnx` with its weights inside.

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
        """Load the artifact and run it once; see `beeline.engine.load`.

        Raises:
            ConfigError: for a device other than the CPU. ArchiveError: for an artifact that does not load.
        """
        self.spec = spec
        self.choice = choices(spec, on_cpu(device, environ, "onnxruntime"), threads_of(threads, environ))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(self.choice["threads"].value)
        options.inter_op_num_threads = 1
        # Threads that wait for work by spinning take the core from the other workers.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                str(folder / spec.model.file), options, providers=["CPUExecutionProvider"]
            )
            self._input = self._session.get_inputs()[0].name
            warm_up(self.forward, spec)
        except Exception as error:
            why = " ".join(str(error).split())[:300]
            raise ArchiveError(
                f"{spec.model.file} does not run on ONNX Runtime {onnxruntime.__version__} ({why}); build it again"
            ) from error

    def forward(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Run the model: uint8 `[N, crop, crop, 3]` to float32 `[N, classes]`.

        Raises:
            RuntimeError: as ONNX Runtime raises it.
        """
        return np.asarray(self._session.run(None, {self._input: pixels})[0], dtype=np.float32)
