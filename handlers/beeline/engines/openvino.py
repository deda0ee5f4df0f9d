"""The engine of OpenVINO models, on CPUs."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from beeline.engines import Engine, Inputs
from beeline.settings import Choice, device_of, positive

# What the CPU plug-in computes in; int8 layers are in the graph itself.
_COMPUTED_IN = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32"}


class OpenVinoEngine(Engine):
    """OpenVINO on the CPU, for its own format: `model.xml`, with its weights in `model.bin`."""

    title = f"OpenVINO {openvino.__version__}"

    def _device(self, gpu_id: int | None) -> Choice:
        fix = ", or build the archive with --engine torch"
        return device_of(self.asked, gpu_id, 0, "OpenVINO runs on CPUs", fix)

    def _prepare(self) -> None:
        """Choose the threads of a lone picture, which may be more than the worker's own share of the cores.

        Where requests queue, batches are larger and a worker keeps to its share. On two cores, with two workers and
        ResNet-18 in int8, one client waits 25 ms instead of 38, and 50 clients get the same requests/s.
        """
        own = int(self.choice["threads"].value)
        lone = positive(self.environ, "BEELINE_LONE_THREADS", own)
        reason = "BEELINE_LONE_THREADS" if lone > own else "as many as a batch"
        self.choice["lone_threads"] = Choice(str(max(lone, own)), reason)

    def _start(self, path: Path) -> None:
        own, lone = (int(self.choice[name].value) for name in ("threads", "lone_threads"))
        precision = self.spec.precision
        core = _core()
        model = core.read_model(path)
        self._weights = path.with_suffix(".bin").resolve()
        self._request = _request(core, model, precision, own)
        self._lone = self._request if lone == own else _request(core, model, precision, lone)
        computed = self._request.get_compiled_model().get_property("INFERENCE_PRECISION_HINT").to_string()
        if computed == "f32" != _COMPUTED_IN[precision]:
            self.choice["precision"] = Choice(
                "fp32", f"this processor has no {precision}, which the archive was built for"
            )

    def _warm_up(self) -> None:
        super()._warm_up()
        _release(self._weights)

    def program(self, path: Path, first: Inputs) -> Callable[[Inputs], list[NDArray[Any]]]:
        """Load another graph; see `Engine.program`."""
        request = _request(_core(), _core().read_model(path), self.spec.precision, int(self.choice["threads"].value))

        def run(inputs: Inputs) -> list[NDArray[Any]]:
            return list(map(np.array, request.infer(dict(inputs), share_inputs=True, share_outputs=True).to_tuple()))

        run(first)
        _release(path.with_suffix(".bin").resolve())
        return run

    def forward(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Run the model; see `Engine.forward`."""
        request = self._lone if len(pixels) == 1 else self._request
        # The next batch overwrites the request's memory, so the scores are copied.
        result = request.infer([pixels], share_inputs=True, share_outputs=True)
        return np.array(result[0], dtype=np.float32)


@functools.cache
def _core() -> openvino.Core:
    """Return the one core of this process.

    The CPU plug-in gives the thread a signal stack. Two cores that end in the order in which they began leave it one
    that is unmapped, and the next signal ends the process (seen with 2026.4, on a processor with AMX).
    """
    return openvino.Core()


def _request(core: openvino.Core, model: openvino.Model, precision: str, threads: int) -> openvino.InferRequest:
    # A worker answers one batch at a time, so one stream gets all threads. They are not pinned: all workers would be
    # pinned to the first cores.
    streams = {"NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
    options = {**streams, "INFERENCE_PRECISION_HINT": _COMPUTED_IN[precision]}
    return core.compile_model(model, "CPU", options).create_infer_request()


def _release(weights: Path) -> None:
    """Give back the memory of the file that OpenVINO maps: its first pass has packed the weights in another layout.

    47 MB of a worker with ResNet-18 in fp32. A page that is read again comes from the file. Does nothing but on Linux.
    """
    maps = Path("/proc/self/maps")
    for line in maps.read_text(encoding="utf-8").splitlines() if maps.exists() else ():
        addresses, permissions, _, _, _, *name = line.split(maxsplit=5)
        # A page that was written to would be lost.
        if name == [str(weights)] and "w" not in permissions:
            start, end = (int(address, 16) for address in addresses.split("-"))
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
