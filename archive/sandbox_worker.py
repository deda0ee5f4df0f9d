"""The clean process of a sandbox: it loads a model folder's handler as a server does, answers batches and times them.

`archive.sandbox` runs it by path with `-I -S`: nothing of this repository can be imported, `beeline` is the archive's
own. Commands come through the pipe of stdin, pickled; replies go to that of stdout as JSON. What handlers print goes
to stderr.
"""

from __future__ import annotations

import importlib
import inspect
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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

VERSION = "fake, by beeline archive"
# The first calls at a new batch size choose kernels and grow the heap.
_WARM_UP = 2
_LEAST_REPEATS = 3
# More repeats than this add nothing to a line through six points.
_MOST_REPEATS = 5
# The words of PyTorch, cuBLAS and C++ where they have no class for it.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "alloc_failed", "bad_alloc")


def main() -> None:
    """Serve commands until stdin ends."""
    commands, replies = Connection(os.dup(0), writable=False), Connection(os.dup(1), readable=False)
    os.dup2(2, 1)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    worker = Worker()
    while True:
        try:
            command = commands.recv()
        except EOFError:
            return
        try:
            for reply in getattr(worker, command.pop("do"))(**command):
                replies.send_bytes(json.dumps(reply).encode())
        except BaseException as error:  # noqa: BLE001 - whatever a handler raises, SystemExit too, is the reply
            failure = {
                "error": type(error).__name__,
                "message": str(error),
                "traceback": traceback.format_exc(),
                # Our own errors are whole sentences.
                "ours": any(base.__name__ == "BeelineError" for base in type(error).__mro__),
                "memory": out_of_memory(error),
            }
            replies.send_bytes(json.dumps(failure).encode())


class Metrics:
    """Ignores what a handler reports; it has the methods that both servers' metrics have."""

    request_ids: dict[int, str] | None = None

    def add_counter(self, *values: object, **options: object) -> None:
        """Ignore the values."""

    add_time = add_size = add_percent = add_error = add_counter


class Worker:
    """One loaded handler with its context; each public method is a command and yields its replies."""

    def load(
        self, folder: str, server: str, batch_size: int, context: str, packages: list[str], hidden: list[str]
    ) -> Iterator[dict[str, Any]]:
        """Import the handler module, find its one class and initialise it.

        Args:
            folder: the unpacked archive.
            server: whose context the handler gets.
            batch_size: what the context says.
            context: the file of TorchServe's own context.
            packages: folders to import from.
            hidden: top-level names that no worker has.
        """
        started = time.perf_counter()
        # The servers put nothing else on the path, so an import that the archive lacks must fail here.
        sys.path[:] = [folder, *sys.path, *packages]
        _hide(frozenset(hidden), frozenset(packages))
        os.chdir(folder)
        manifest = json.loads(Path(folder, "MAR-INF", "MANIFEST.json").read_text(encoding="utf-8"))
        model = manifest["model"]
        module = importlib.import_module(Path(model["handler"].partition(":")[0]).stem)
        classes: list[Any] = [
            member for _, member in inspect.getmembers(module, inspect.isclass) if member.__module__ == module.__name__
        ]
        if len(classes) != 1:
            names = ", ".join(each.__name__ for each in classes) or "none"
            raise ValueError(f"{model['handler']} defines the classes {names}; both servers want exactly one")
        self.folder = Path(folder)
        self.context, self.request = context_of(server, context, model["modelName"], folder, manifest, batch_size)
        self.handler = classes[0]()
        self.handler.initialize(self.context)
        self.load_seconds = time.perf_counter() - started
        choice = getattr(getattr(self.handler, "engine", None), "choice", {})
        yield {"choice": {name: [made.value, made.reason] for name, made in choice.items()}}

    def predict(self, bodies: list[bytes], headers: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
        """Answer one batch: a body and headers a request."""
        self._begin(headers)
        answers = self.handler.handle(_rows(bodies), self.context)
        if not isinstance(answers, list) or len(answers) != len(bodies):
            got = f"{len(answers)} answers" if isinstance(answers, list) else f"a {type(answers).__name__}"
            raise ValueError(f"the handler returned {got} for {len(bodies)} requests; both servers fail such a batch")
        replies = []
        for index, answer in enumerate(answers):
            status, phrase = self.context.get_response_status(index)
            body = answer if isinstance(answer, str) else json.dumps(answer)
            sent = self.context.get_response_headers(index)
            replies.append({"status": status, "phrase": phrase or "", "body": body, "headers": sent})
        yield {"answers": replies}

    def pictures(self, bodies: list[bytes], memory: int | None) -> Iterator[dict[str, Any]]:
        """Take the pictures that are timed, and decode each to see whether the model takes it.

        Args:
            bodies: encoded pictures.
            memory: bytes that this process may take on the CPU; None for no limit.
        """
        name = type(self.handler).__name__
        if not all(callable(getattr(self.handler, stage, None)) for stage in ("preprocess", "inference", "handle")):
            raise ValueError(f"{name} is no VisionHandler, whose stages are timed one by one")
        if memory is not None and self.handler.engine.choice["device"].value == "cpu":
            # A batch takes private, writable memory. A refused allocation is an exception; without the limit the
            # kernel would end some process.
            resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        errors = [getattr(row, "error", None) for row in self.handler.preprocess(_rows(bodies)).rows]
        refused = next((str(error) for error in errors if error is not None), None)
        self.bodies = bodies
        self.failures: list[BaseException] = []
        for stage in ("preprocess", "inference"):
            setattr(self.handler, stage, self._remembering(getattr(self.handler, stage)))
        spec = self.handler.spec
        yield {"model": spec.name, "version": spec.version, "classes": len(spec.labels), "refused": refused}

    def stages(self, batch: int, repeats: int, seconds: float) -> Iterator[dict[str, Any]]:
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
            # In turns, so that a slow moment of the machine does not fall on one stage alone.
            for name, stage in stages.items():
                samples[name].append(1000 * sum(stage(call) for call in range(calls)) / calls)
        yield {"samples": samples}

    def batches(self, batch_sizes: list[int], seconds: float, lone: int) -> Iterator[dict[str, Any]]:
        """Time decoding and the forward pass by batch size; see `Sandbox.time_batches`. The last reply is `end`."""
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
        # Last, so that batches of one were timed with the same threads as the others.
        if self.handler.spec.engine == "openvino" and lone > int(engine.choice["threads"].value):
            start = time.perf_counter()
            second = type(engine)(self.folder, self.handler.spec, threads=lone)
            seconds = time.perf_counter() - start
            yield {"cost": self._cost(self.load_seconds + seconds), "threads": second.choice["threads"].value}
        yield {"end": True}

    def _begin(self, headers: list[dict[str, str]]) -> None:
        """Put a batch's requests into the context, as the servers do before they call the handler."""
        self.context.request_processor = [self.request(dict(header)) for header in headers]
        self.context.request_ids = {index: f"fake-{index}" for index in range(len(headers))}
        # Multi Model Server's context gets its metrics with the first batch.
        self.context.metrics = self.context.metrics or Metrics()
        self.context.metrics.request_ids = self.context.request_ids

    def _cost(self, seconds: float) -> dict[str, Any]:
        """Return what a worker takes that loaded in so many seconds: memory, and memory of a CUDA device."""
        import psutil
        import torch  # TorchServe's workers import it, whatever their engine is.

        cost = {"memory": psutil.Process().memory_info().rss, "load_seconds": seconds}
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return cost
        free, total = torch.cuda.mem_get_info()
        # PyTorch counts neither the context nor the largest picture, in bytes and in floats.
        uncounted = 600 << 20
        if self.handler.spec.geometry.decoding == "cuda":
            uncounted += 15 * self.handler.limits.max_pixels
        reserved = torch.cuda.max_memory_reserved()
        return {**cost, "device_memory": reserved + uncounted, "device_free": min(free, total)}

    def _batch(self, size: int, call: int) -> list[bytes]:
        return [self.bodies[(call * size + index) % len(self.bodies)] for index in range(size)]

    def _decoded(self, rows: list[dict[str, bytearray]]) -> None:
        self.handler.inference(self.handler.preprocess(rows))

    def _stages(self, batch: int) -> dict[str, Callable[[int], float]]:
        """Return each stage as a function that takes the number of the call and returns its seconds."""
        handler = self.handler
        calls = max(1, len(self.bodies) // batch)
        pictures = [self._batch(batch, call) for call in range(calls)]
        batches = [handler.preprocess(_rows(bodies)) for bodies in pictures]
        forward, place = forward_of(handler.engine)
        placed = [place(each.stack()) for each in batches]

        def handle(call: int) -> float:
            self._begin([{}] * batch)
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

    def _remembering(self, stage: Callable[..., Any]) -> Callable[..., Any]:
        """Keep what a stage raises: after an error the handler answers each request alone, which must not be timed."""

        def run(value: Any) -> Any:
            try:
                return stage(value)
            except Exception as error:
                self.failures.append(error)
                raise

        return run


def context_of(
    server: str, code: str, model: str, folder: str, manifest: dict[str, Any], batch_size: int
) -> tuple[Any, Callable[[dict[str, Any]], Any]]:
    """Return the server's context for one model, and what makes a request of its headers.

    TorchServe's context is read from its own file. Multi Model Server's has the same methods and fewer attributes.
    """
    names = runpy.run_path(code)
    context = names["Context"](
        model, folder, manifest, batch_size, None, VERSION, metrics=Metrics(), model_yaml_config={}
    )
    if server == "mms":
        context.metrics = None
        del context.model_yaml_config, context.stopping_criteria, context.system_properties["limit_max_image_pixels"]
    return context, names["RequestProcessor"]


def out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that the batch did not fit into memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def forward_of(engine: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Return the forward pass alone, and what brings a stacked batch to its device first."""
    if engine.choice["device"].value == "cpu" or not hasattr(engine, "on_device"):
        # ONNX Runtime copies there and back by itself.
        return engine.forward, lambda pixels: pixels
    import torch

    device = torch.device(engine.choice["device"].value)

    def forward(pixels: Any) -> None:
        # The engine's own `forward` copies there and back.
        engine.on_device(pixels)
        # The call only queues kernels.
        torch.cuda.synchronize(device)

    return forward, lambda pixels: torch.from_numpy(pixels).to(device)


def _rows(bodies: list[bytes]) -> list[dict[str, bytearray]]:
    return [{"body": bytearray(body)} for body in bodies]


def _timed(work: Callable[[Any], Any], value: Any) -> float:
    start = time.perf_counter()
    work(value)
    return time.perf_counter() - start


def _hide(names: frozenset[str], folders: frozenset[str]) -> None:
    """Make installed packages that no worker has look as if they were not installed.

    Only in the folders of packages: setuptools, which PyTorch's compiler imports, brings some of the same names.
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
