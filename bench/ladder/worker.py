"""The measured worker: an archive's own handler in a process of its own, timed stage by stage.

Run by path with `-I` (see `bench.ladder.process`) and with the unpacked archive first on the path, so that
the handler and the `beeline` that run are the archive's; hence nothing of this repository here. It reads one
JSON line a command from stdin and writes one JSON line a reply to the descriptor that stdout was; stdout
itself becomes stderr, since handlers print.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The first calls at a new batch size choose kernels and grow the heap.
_WARM_UP = 2
_LEAST_REPEATS = 3
_STAGES = ("initialize", "preprocess", "inference", "handle")
# How PyTorch, cuBLAS and C++ say it where they have no class for it.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "alloc_failed", "bad_alloc")


def main() -> None:
    """Serve commands until stdin ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    worker = Worker()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            reply = worker.load(command) if command["do"] == "load" else worker.measure(command)
        except BaseException as error:  # noqa: BLE001 - whatever a handler raises, SystemExit too, is the reply
            traceback.print_exc()
            ours = any(kind.__name__ == "BeelineError" for kind in type(error).__mro__)
            message = " ".join(str(error).split())[:400]
            reply = {
                "error": message if ours else f"{type(error).__name__}: {message}",
                "memory": out_of_memory(error),
            }
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


class Context:
    """As much of a server's context as a handler asks for; it is no server."""

    model_yaml_config: dict[str, Any]

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.manifest = manifest
        self.model_yaml_config = {}
        self.metrics = None
        self.system_properties = {"model_dir": str(folder), "gpu_id": None, "batch_size": 1, "server_name": "MMS"}
        self.statuses: dict[int, int] = {}

    def get_request_id(self, idx: int = 0) -> str:
        """Return an id for request `idx`."""
        return f"bench-{idx}"

    def get_request_header(self, idx: int, key: str) -> None:
        """Return no header: the requests have none."""

    def get_all_request_header(self, idx: int) -> dict[str, Any]:
        """Return no headers."""
        return {}

    def set_response_status(self, code: int = 200, phrase: str = "", idx: int = 0) -> None:
        """Keep the status of answer `idx`."""
        self.statuses[idx] = int(code)

    def set_response_content_type(self, idx: int, value: str) -> None:
        """Forget the content type."""

    def set_response_header(self, idx: int, key: str, value: str) -> None:
        """Forget the header."""


class Worker:
    """One loaded handler and the pictures it is timed with."""

    def load(self, command: dict[str, Any]) -> dict[str, Any]:
        """Load the archive's handler, and decode every picture once to see that it can.

        Args:
            command: `folder` (the unpacked archive), `pictures` (paths), `memory` (bytes, or null).
        """
        folder = Path(command["folder"])
        sys.path.insert(0, str(folder))
        os.chdir(folder)
        manifest = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text(encoding="utf-8"))
        module = importlib.import_module(Path(manifest["model"]["handler"].partition(":")[0]).stem)
        classes: list[Any] = [
            one for _, one in inspect.getmembers(module, inspect.isclass) if one.__module__ == module.__name__
        ]
        if len(classes) != 1:
            raise ValueError(f"{module.__name__} defines {len(classes)} classes; both servers want exactly one")
        if not all(callable(getattr(classes[0], stage, None)) for stage in _STAGES):
            raise ValueError(f"{classes[0].__name__} is no VisionHandler, whose stages are timed one by one")
        self.handler = classes[0]()
        self.context = Context(folder, manifest)
        self.handler.initialize(self.context)
        choice = self.handler.engine.choice
        if choice["device"].value == "cpu" and command["memory"] is not None:
            # Private memory that can be written, which is what a batch takes; a refused allocation is an
            # exception, too little memory in the machine is the end of some process.
            resource.setrlimit(resource.RLIMIT_DATA, (command["memory"], command["memory"]))
        self.bodies = [Path(path).read_bytes() for path in command["pictures"]]
        self._check()
        self._remember_failures()
        spec = self.handler.spec
        about = {name: [made.value, made.reason] for name, made in choice.items()}
        return {"model": spec.name, "version": spec.version, "classes": len(spec.labels), "choice": about}

    def measure(self, command: dict[str, Any]) -> dict[str, Any]:
        """Time each stage at one batch size.

        Args:
            command: `batch`, `repeats`, and `seconds` after which three repeats are enough.

        Returns:
            `samples`: by stage, each sample the mean milliseconds of a batch over one pass of the pictures.
        """
        batch = int(command["batch"])
        stages = self._stages(batch)
        for stage in stages.values():
            for call in range(_WARM_UP):
                stage(call)
        calls = max(1, len(self.bodies) // batch)
        samples: dict[str, list[float]] = {name: [] for name in stages}
        start = time.perf_counter()
        for repeat in range(int(command["repeats"])):
            if repeat >= _LEAST_REPEATS and time.perf_counter() - start > command["seconds"]:
                break
            # In turns, so that a slow moment of the machine does not fall on one stage alone.
            for name, stage in stages.items():
                samples[name].append(1000 * sum(stage(call) for call in range(calls)) / calls)
        return {"samples": samples}

    def _stages(self, batch: int) -> dict[str, Callable[[int], float]]:
        """Return each stage as a function of the number of the call, which returns the seconds it took."""
        handler = self.handler
        calls = max(1, len(self.bodies) // batch)
        pictures = [[self.bodies[(c * batch + i) % len(self.bodies)] for i in range(batch)] for c in range(calls)]
        batches = [handler.preprocess(_rows(some)) for some in pictures]
        forward, place = _forward(handler.engine)
        placed = [place(each.stack()) for each in batches]

        def handle(call: int) -> float:
            rows = _rows(pictures[call % calls])
            self.context.statuses.clear()
            start = time.perf_counter()
            handler.handle(rows, self.context)
            seconds = time.perf_counter() - start
            self._check_answers(batch)
            return seconds

        return {
            "forward": lambda call: _timed(forward, placed[call % calls]),
            "copied": lambda call: _timed(handler.inference, batches[call % calls]),
            "decoded": lambda call: _timed(
                lambda rows: handler.inference(handler.preprocess(rows)), _rows(pictures[call % calls])
            ),
            "handler": handle,
        }

    def _check(self) -> None:
        for row in self.handler.preprocess(_rows(self.bodies)).rows:
            error = getattr(row, "error", None)
            if error is not None:
                raise ValueError(f"a picture of the mix is refused ({error}); name pictures that the model takes")

    def _remember_failures(self) -> None:
        """Keep what a stage raises: the handler answers each request alone then, which is another measurement."""
        self.failures: list[BaseException] = []

        def remembering(stage: Callable[..., Any]) -> Callable[..., Any]:
            def run(value: Any) -> Any:
                try:
                    return stage(value)
                except Exception as error:
                    self.failures.append(error)
                    raise

            return run

        for name in ("preprocess", "inference"):
            setattr(self.handler, name, remembering(getattr(self.handler, name)))

    def _check_answers(self, batch: int) -> None:
        if self.failures:
            raise self.failures[0]
        statuses = [self.context.statuses.get(i) for i in range(batch)]
        if statuses != [200] * batch:
            raise ValueError(f"the handler answered {sorted(set(map(str, statuses)))} instead of 200 alone")


def out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that the batch did not fit into memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def _forward(engine: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Return the forward pass alone, and what brings a stacked batch to its device first."""
    import torch

    device = torch.device(engine.choice["device"].value)
    if device.type == "cpu" or not hasattr(engine, "on_device"):
        # ONNX Runtime copies there and back by itself.
        return engine.forward, lambda pixels: pixels

    def forward(pixels: Any) -> None:
        # The engine's own `forward` copies there and back.
        engine.on_device(pixels)
        # Kernels are only queued by the call.
        torch.cuda.synchronize(device)

    return forward, lambda pixels: torch.from_numpy(pixels).to(device)


def _rows(pictures: list[bytes]) -> list[dict[str, bytearray]]:
    return [{"body": bytearray(picture)} for picture in pictures]


def _timed(work: Callable[[Any], Any], value: Any) -> float:
    start = time.perf_counter()
    work(value)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
