"""The clean process of a sandbox: loads a model folder's handler as a server does, answers batches and times them.

Run by path, with `-I -S` (see `archive.sandbox`), so that nothing of this repository can be imported; hence the
standard library only, and `beeline` is the archive's own. It reads one JSON line a command from stdin, each
followed by the bytes it announces, and writes one or more JSON lines a reply to the descriptor that stdout was;
stdout itself becomes stderr, since handlers print.
"""

from __future__ import annotations

import importlib
import importlib.util
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
from pathlib import Path
from typing import Any

# No import: the folder of this file is not on the path.
CONTEXTS = runpy.run_path(str(Path(__file__).with_name("sandbox_context.py")))["CONTEXTS"]
# The first calls at a new batch size choose kernels and grow the heap.
_WARM_UP = 2
_LEAST_REPEATS = 3
# More repeats than this add nothing to a line through six points.
_MOST_REPEATS = 5
# How PyTorch, cuBLAS and C++ say it where they have no class for it.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "alloc_failed", "bad_alloc")


def main() -> None:
    """Serve commands until stdin ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")

    def tell(values: dict[str, Any]) -> None:
        replies.write(json.dumps(values) + "\n")
        replies.flush()

    worker = Worker()
    while line := sys.stdin.buffer.readline():
        command = json.loads(line)
        bodies = [sys.stdin.buffer.read(size) for size in command.pop("sizes")]
        try:
            for reply in getattr(worker, command.pop("do"))(bodies, **command):
                tell(reply)
        except BaseException as error:  # noqa: BLE001 - whatever a handler raises, SystemExit too, is the reply
            tell(
                {
                    "error": type(error).__name__,
                    "message": str(error),
                    "traceback": traceback.format_exc(),
                    # An error of ours has its own sentence.
                    "ours": any(base.__name__ == "BeelineError" for base in type(error).__mro__),
                    "memory": out_of_memory(error),
                }
            )


class Worker:
    """One loaded handler with its context; each public method is a command and yields its replies."""

    def load(
        self,
        bodies: list[bytes],
        folder: str,
        server: str,
        batch_size: int,
        packages: list[str],
        hidden: list[str],
        rooms: list[str],
    ) -> Iterator[dict[str, Any]]:
        """Import the handler module, find its one class and initialise it.

        Args:
            bodies: none.
            folder: the unpacked archive.
            server: whose context the handler gets.
            batch_size: what that says.
            packages: folders to import from.
            hidden: top-level names that no worker has.
            rooms: names of this repository, which must not be there.
        """
        started = time.perf_counter()
        sys.path[:] = [folder, *sys.path, *packages]
        _hide(frozenset(hidden), frozenset(packages))
        os.chdir(folder)
        # TorchServe and Multi Model Server put nothing else on the path: what the archive lacks must fail here.
        for room in rooms:
            spec = importlib.util.find_spec(room)
            if spec is not None and not str(spec.origin or "").startswith(folder):
                raise ImportError(f"{room} of this repository is on the clean worker's path ({spec.origin})")
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
        self.context = CONTEXTS[server](model["modelName"], folder, manifest, batch_size, None)
        self.handler = classes[0]()
        self.handler.initialize(self.context)
        self.load_seconds = time.perf_counter() - started
        choice = getattr(getattr(self.handler, "engine", None), "choice", {})
        yield {"choice": {name: [made.value, made.reason] for name, made in choice.items()}}

    def predict(self, bodies: list[bytes], headers: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
        """Answer one batch: a body and headers a request."""
        self.context.begin_batch(headers)
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
            # Private memory that can be written, which is what a batch takes; a refused allocation is an
            # exception, too little memory in the machine is the end of some process.
            resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        errors = [getattr(row, "error", None) for row in self.handler.preprocess(_rows(bodies)).rows]
        refused = next((str(error) for error in errors if error is not None), None)
        self.bodies = bodies
        self.failures: list[BaseException] = []
        for stage in ("preprocess", "inference"):
            setattr(self.handler, stage, self._remembering(getattr(self.handler, stage)))
        spec = self.handler.spec
        yield {"model": spec.name, "version": spec.version, "classes": len(spec.labels), "refused": refused}

    def stages(self, bodies: list[bytes], batch: int, repeats: int, seconds: float) -> Iterator[dict[str, Any]]:
        """Time each stage at one batch size.

        Args:
            bodies: none; those of `pictures` are timed.
            batch: pictures of a batch.
            repeats: samples of a stage.
            seconds: after which three of them are enough.

        Yields:
            `samples`: by stage, each sample the mean milliseconds of a batch over one pass of the pictures.
        """
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

    def batches(
        self, bodies: list[bytes], batch_sizes: list[int], seconds: float, lone: int
    ) -> Iterator[dict[str, Any]]:
        """Time decoding and the forward pass by batch size, and tell what this process takes.

        Args:
            bodies: none; those of `pictures` are timed.
            batch_sizes: in this order, until time is up.
            seconds: how long.
            lone: threads for a picture that comes alone, for which a worker on OpenVINO holds a second model.

        Yields:
            `batch` and its median `ms`, a size at a time; then `cost`, the last one of which counts; then `end`.
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
        # After the measurements: a batch of one is timed with the threads of every other.
        if self.handler.spec.engine == "openvino" and lone > int(engine.choice["threads"].value):
            start = time.perf_counter()
            second = type(engine)(self.folder, self.handler.spec, threads=lone)
            seconds = time.perf_counter() - start
            yield {"cost": self._cost(self.load_seconds + seconds), "threads": second.choice["threads"].value}
        yield {"end": True}

    def _cost(self, seconds: float) -> dict[str, Any]:
        """Return what a worker takes that loaded in so many seconds: its memory, and on a CUDA device that one's."""
        import psutil
        import torch  # TorchServe's workers import it, whatever their engine is.

        cost = {"memory": psutil.Process().memory_info().rss, "load_seconds": seconds}
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return cost
        free, total = torch.cuda.mem_get_info()
        # The context itself, which PyTorch does not count; and the largest picture, in bytes and in floats.
        besides = 600 << 20
        if self.handler.spec.geometry.decoding == "cuda":
            besides += 15 * self.handler.limits.max_pixels
        return {**cost, "device_memory": torch.cuda.max_memory_reserved() + besides, "device_free": min(free, total)}

    def _batch(self, size: int, call: int) -> list[bytes]:
        return [self.bodies[(call * size + index) % len(self.bodies)] for index in range(size)]

    def _decoded(self, rows: list[dict[str, bytearray]]) -> None:
        self.handler.inference(self.handler.preprocess(rows))

    def _stages(self, batch: int) -> dict[str, Callable[[int], float]]:
        """Return each stage as a function of the number of the call, which returns the seconds it took."""
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

    def _remembering(self, stage: Callable[..., Any]) -> Callable[..., Any]:
        """Keep what a stage raises: the handler answers each request alone then, which is another measurement."""

        def run(value: Any) -> Any:
            try:
                return stage(value)
            except Exception as error:
                self.failures.append(error)
                raise

        return run


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
        # Kernels are only queued by the call.
        torch.cuda.synchronize(device)

    return forward, lambda pixels: torch.from_numpy(pixels).to(device)


def _rows(bodies: list[bytes]) -> list[dict[str, bytearray]]:
    return [{"body": bytearray(body)} for body in bodies]


def _timed(work: Callable[[Any], Any], value: Any) -> float:
    start = time.perf_counter()
    work(value)
    return time.perf_counter() - start


def _hide(names: frozenset[str], folders: frozenset[str]) -> None:
    """Make installed packages that no worker has look as if they were not there.

    Only where packages are installed: setuptools, which PyTorch's compiler imports, brings some of the same names.
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
