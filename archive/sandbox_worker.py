"""The clean process of a sandbox: it loads the handler of a model folder like a server, answers batches and times them.

`archive.sandbox` runs this file by path with `-I -S`, so that nothing of this repository can be imported. It uses only
the standard library, and `beeline` is the archive's own. A command on stdin is one JSON line and the bytes that it
announces. A reply is one or more JSON lines on the first stdout; handlers print, and their stdout is stderr.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import resource
import runpy
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

# Not an import, since the folder of this file is not on the path.
HANDLERS = runpy.run_path(str(Path(__file__).with_name("sandbox_context.py")))
# The first calls with a new batch size choose kernels and grow the heap.
_WARM_UP = 2
_LEAST_REPEATS = 3
# More repeats add nothing to a line through six points.
_MOST_REPEATS = 5
# The packages of this repository, which no worker has.
_ROOMS = ("archive", "bench", "cli", "host", "serve", "train")
# The words of PyTorch, cuBLAS and C++ in errors that have no class of their own.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "alloc_failed", "bad_alloc")


def main() -> None:
    """Serve commands until stdin ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")

    def send(values: dict[str, Any]) -> None:
        replies.write(json.dumps(values) + "\n")
        replies.flush()

    worker = Worker()
    while line := sys.stdin.buffer.readline():
        command = json.loads(line)
        bodies = [sys.stdin.buffer.read(size) for size in command.pop("sizes")]
        try:
            for reply in getattr(worker, command.pop("do"))(bodies, **command):
                send(reply)
        except BaseException as error:  # noqa: BLE001 - whatever a handler raises is the reply, also SystemExit
            # The message of our own error is a whole sentence.
            is_ours = any(base.__name__ == "BeelineError" for base in type(error).__mro__)
            words = {"error": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
            send({**words, "ours": is_ours, "memory": out_of_memory(error)})


class Worker:
    """One loaded handler with its context; each public method is a command and yields its replies."""

    def load(
        self, bodies: list[bytes], folder: str, server: str, batch_size: int, packages: list[str], hidden: list[str]
    ) -> Iterator[dict[str, Any]]:
        """Import the handler's module from the unpacked archive in `folder`, and initialise its one class.

        Imports come from the folders in `packages`, except the top-level names in `hidden`. `batch_size` goes into the
        context of `server`.
        """
        started = time.perf_counter()
        sys.path[:] = [folder, *sys.path, *packages]
        _hide(frozenset(hidden), frozenset(packages))
        os.chdir(folder)
        # TorchServe and Multi Model Server put nothing else on the path: what an archive lacks must fail here.
        for room in _ROOMS:
            spec = importlib.util.find_spec(room)
            if spec is not None and not str(spec.origin or "").startswith(folder):
                raise ImportError(f"{room} of this repository is on the clean worker's path ({spec.origin})")
        manifest = json.loads(Path(folder, "MAR-INF", "MANIFEST.json").read_text(encoding="utf-8"))
        self.handler = HANDLERS["new_handler"](manifest)
        self.folder = Path(folder)
        self.context = HANDLERS["CONTEXTS"][server](manifest["model"]["modelName"], folder, manifest, batch_size, None)
        self.handler.initialize(self.context)
        self.load_seconds = time.perf_counter() - started
        choice = getattr(getattr(self.handler, "engine", None), "choice", {})
        yield {"choice": {name: [each.value, each.reason] for name, each in choice.items()}}

    def predict(self, bodies: list[bytes]) -> Iterator[dict[str, Any]]:
        """Answer one batch."""
        self.context.begin_batch([{}] * len(bodies))
        answers = self.handler.handle(_rows(bodies), self.context)
        if not isinstance(answers, list) or len(answers) != len(bodies):
            got = f"{len(answers)} answers" if isinstance(answers, list) else f"a {type(answers).__name__}"
            raise ValueError(f"the handler returned {got} for {len(bodies)} requests; both servers fail such a batch")
        replies = []
        for index, answer in enumerate(answers):
            status, phrase = self.context.get_response_status(index)
            body = answer if isinstance(answer, str) else json.dumps(answer)
            headers = self.context.get_response_headers(index)
            replies.append({"status": status, "phrase": phrase or "", "body": body, "headers": headers})
        yield {"answers": replies}

    def pictures(self, bodies: list[bytes], memory: int | None) -> Iterator[dict[str, Any]]:
        """Take the pictures to time, and decode each to see whether the model accepts it.

        `memory` is how many bytes this process may allocate on the CPU; None is no limit.
        """
        name = type(self.handler).__name__
        if not all(callable(getattr(self.handler, stage, None)) for stage in ("preprocess", "inference", "handle")):
            raise ValueError(f"{name} is no VisionHandler, and only the stages of one can be timed")
        if memory is not None and self.handler.engine.choice["device"].value == "cpu":
            # Private writable memory, which is what a batch takes. A refused allocation is an exception; without the
            # limit, a machine that runs out of memory kills some process.
            resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        errors = [getattr(row, "error", None) for row in self.handler.preprocess(_rows(bodies)).rows]
        refused = next((str(error) for error in errors if error is not None), None)
        self.bodies = bodies
        self.failures: list[BaseException] = []
        for stage in ("preprocess", "inference"):
            setattr(self.handler, stage, self._recorded(getattr(self.handler, stage)))
        spec = self.handler.spec
        yield {"model": spec.name, "version": spec.version, "classes": len(spec.labels), "refused": refused}

    def stages(self, bodies: list[bytes], batch: int, repeats: int, seconds: float) -> Iterator[dict[str, Any]]:
        """Time each stage at one batch size; see `Sandbox.time_stages`."""
        stages = self._stages(batch)
        for stage in stages.values():
            for call in range(_WARM_UP):
                stage(call)
        calls = max(1, len(self.bodies) // batch)
        samples: dict[str, list[float]] = {name: [] for name in stages}
        start = time.perf_counter()
        for repeat in range(repeats):
            if repeat >= _LEAST_REPEATS and time.perf_counter() - start > seconds:
                break
            # All stages in each repeat, so that a slow moment of the machine does not fall on one stage alone.
            for name, stage in stages.items():
                samples[name].append(1000 * sum(stage(call) for call in range(calls)) / calls)
        yield {"samples": samples}

    def batches(
        self, bodies: list[bytes], batch_sizes: list[int], seconds: float, lone: int
    ) -> Iterator[dict[str, Any]]:
        """Time decoding and the forward pass by batch size, and measure what this process takes.

        See `Sandbox.time_batches`; the last reply is `end`.
        """
        start = time.perf_counter()
        for call in range(_WARM_UP):
            self._decoded(_rows(self._batch(2, call)))
        for size in batch_sizes:
            times: list[float] = []
            while len(times) < _MOST_REPEATS and (not times or time.perf_counter() - start < seconds):
                times.append(1000 * _timed(self._decoded, _rows(self._batch(size, 0))))
            yield {"batch": size, "ms": statistics.median(times)}
            if time.perf_counter() - start > seconds:
                break
        yield {"cost": self._cost(self.load_seconds)}
        engine = self.handler.engine
        # A worker on OpenVINO holds a second model for lone pictures. It loads after the measurements, since a batch of
        # one is timed with the same threads as the others.
        if self.handler.spec.engine == "openvino" and lone > int(engine.choice["threads"].value):
            start = time.perf_counter()
            second = type(engine)(self.folder, self.handler.spec, threads=lone)
            seconds = time.perf_counter() - start
            yield {"cost": self._cost(self.load_seconds + seconds), "threads": second.choice["threads"].value}
        yield {"end": True}

    def _cost(self, seconds: float) -> dict[str, Any]:
        """Return the memory of this process and of its CUDA device, with the seconds that it took to load."""
        import psutil
        import torch  # TorchServe's workers import it with every engine.

        cost = {"memory": psutil.Process().memory_info().rss, "load_seconds": seconds}
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return cost
        free, total = torch.cuda.mem_get_info()
        # PyTorch does not count the context itself. The largest picture is added, in bytes and in floats.
        uncounted = 600 << 20
        if self.handler.spec.geometry.decoding == "cuda":
            uncounted += 15 * self.handler.limits.max_pixels
        return {**cost, "device_memory": torch.cuda.max_memory_reserved() + uncounted, "device_free": min(free, total)}

    def _batch(self, size: int, call: int) -> list[bytes]:
        return [self.bodies[(call * size + index) % len(self.bodies)] for index in range(size)]

    def _decoded(self, rows: list[dict[str, bytearray]]) -> None:
        self.handler.inference(self.handler.preprocess(rows))

    def _stages(self, batch: int) -> dict[str, Callable[[int], float]]:
        """Return each stage as a function from the number of a call to the seconds that it takes."""
        handler = self.handler
        calls = max(1, len(self.bodies) // batch)
        pictures = [self._batch(batch, call) for call in range(calls)]
        batches = [handler.preprocess(_rows(bodies)) for bodies in pictures]
        forward, place = forward_of(handler.engine)
        placed = [place(each.stack()) for each in batches]

        def handle(call: int) -> float:
            self.context.begin_batch([{}] * batch)
            seconds = _timed(lambda rows: handler.handle(rows, self.context), _rows(pictures[call % calls]))
            if self.failures:
                raise self.failures[0]
            statuses = {self.context.get_response_status(index)[0] for index in range(batch)}
            if statuses != {200}:
                raise ValueError(f"the handler answered {sorted(statuses)} instead of 200 alone")
            return seconds

        return {
            "forward": lambda call: _timed(forward, placed[call % calls]),
            "copied": lambda call: _timed(handler.inference, batches[call % calls]),
            "decoded": lambda call: _timed(self._decoded, _rows(pictures[call % calls])),
            "handler": handle,
        }

    def _recorded(self, stage: Callable[..., Any]) -> Callable[..., Any]:
        """Record what a stage raises, since the handler then answers each request alone, which must not be timed."""

        def run(value: Any) -> Any:
            try:
                return stage(value)
            except Exception as error:
                self.failures.append(error)
                raise

        return run


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the batch did not fit into memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def forward_of(engine: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Return the forward pass alone, and a function that first copies a stacked batch to its device."""
    if engine.choice["device"].value == "cpu" or not hasattr(engine, "on_device"):
        # ONNX Runtime copies to the device and back by itself.
        return engine.forward, lambda pixels: pixels
    import torch

    device = torch.device(engine.choice["device"].value)

    def forward(pixels: Any) -> None:
        # The engine's own `forward` copies to the device and back. This call only queues kernels.
        engine.on_device(pixels)
        torch.cuda.synchronize(device)

    return forward, lambda pixels: torch.from_numpy(pixels).to(device)


def _rows(bodies: list[bytes]) -> list[dict[str, bytearray]]:
    return [{"body": bytearray(body)} for body in bodies]


def _timed(work: Callable[[Any], Any], value: Any) -> float:
    start = time.perf_counter()
    work(value)
    return time.perf_counter() - start


def _hide(names: frozenset[str], folders: frozenset[str]) -> None:
    """Hide installed packages that no worker has.

    Only in the folders of installed packages: setuptools, which PyTorch's compiler imports, has some of the same names.
    """

    class WorkerPathFinder(PathFinder):
        @classmethod
        def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
            if path is None and fullname in names:
                path = [folder for folder in sys.path if folder not in folders]
            return PathFinder.find_spec(fullname, path, target)

    sys.meta_path[:] = [WorkerPathFinder if finder is PathFinder else finder for finder in sys.meta_path]


if __name__ == "__main__":
    main()
