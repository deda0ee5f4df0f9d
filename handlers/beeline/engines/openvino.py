"""The engine of OpenVINO models, on CPUs; a whole graph is compiled for the instructions that the CPU has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import openvino
from numpy.typing import NDArray

from beeline.engines import choices, warm_up
from beeline.errors import ArchiveError
from beeline.settings import Choice, lone_threads_of, on_cpu, threads_of
from beeline.spec import ModelSpec

# What the CPU plug-in computes the rest in where the graph says nothing; int8 layers are in the graph itself.
_COMPUTED_IN = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32"}


class OpenVinoEngine:
    """OpenVINO on the CPU, for its own format: `model.xml`, its weights beside it in `model.bin`.

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
        """Compile the artifact and run it once; see `beeline.engines.load`.

        Raises:
            ConfigError: for a device other than the CPU. ArchiveError: for an artifact that does not load.
        """
        self.spec = spec
        self.choice = choices(spec, on_cpu(device, environ, "openvino"), threads_of(threads, environ))
        own = int(self.choice["threads"].value)
        self.choice["lone_threads"] = lone_threads_of(own, environ)
        lone = int(self.choice["lone_threads"].value)
        try:
            core = openvino.Core()
            model = core.read_model(folder / spec.model.file)
            self._request = _request(core, model, spec, own)
            self._lone = self._request if lone == own else _request(core, model, spec, lone)
            computed = self._request.get_compiled_model().get_property("INFERENCE_PRECISION_HINT").to_string()
            if computed == "f32" != _COMPUTED_IN[spec.precision]:
                self.choice["precision"] = Choice(
                    "fp32", f"this processor has no {spec.precision}, which the archive was built for"
                )
            warm_up(self.forward, spec)
        except Exception as error:
            why = " ".join(str(error).split())[:300]
            raise ArchiveError(
                f"{spec.model.file} does not run on OpenVINO {openvino.__version__} ({why}); build it again"
            ) from error

    def forward(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Run the model: uint8 `[N, crop, crop, 3]` to float32 `[N, classes]`.

        Raises:
            RuntimeError: as OpenVINO raises it.
        """
        request = self._lone if len(pixels) == 1 else self._request
        # The request's own memory is overwritten by the next batch, so the scores are copied out of it.
        result = request.infer([pixels], share_inputs=True, share_outputs=True)
        return np.array(result[0], dtype=np.float32)


def _request(core: openvino.Core, model: openvino.Model, spec: ModelSpec, threads: int) -> openvino.InferRequest:
    # A worker answers a batch at a time, so one stream with all of its threads. They are not pinned: the workers of
    # one machine would all be pinned to its first cores.
    compiled = core.compile_model(
        model,
        "CPU",
        {
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": _COMPUTED_IN[spec.precision],
        },
    )
    return compiled.create_infer_request()
