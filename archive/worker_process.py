"""The clean worker process: loads a model folder's handler as a server does and answers batches.

Run by path, with `-I -S` (see `archive.runner`), so that nothing of this repository can be imported; hence the
standard library only. It reads one JSON line a command from stdin, each followed by the bytes it announces,
and writes one JSON line a reply to the descriptor that stdout was; stdout itself becomes stderr, since
handlers print.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import logging
import os
import sys
import traceback
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, BinaryIO


def main() -> None:
    """Serve commands until stdin ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    commands = sys.stdin.buffer
    worker = Worker()
    while line := commands.readline():
        command = json.loads(line)
        try:
            reply = worker.load(command) if command["do"] == "load" else worker.predict(command, commands)
        except BaseException as error:  # noqa: BLE001 - whatever a handler raises, SystemExit too, is the reply
            reply = {
                "error": type(error).__name__,
                "message": str(error),
                "traceback": traceback.format_exc(),
                # An error of ours has its own sentence.
                "ours": any(base.__name__ == "BeelineError" for base in type(error).__mro__),
            }
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


class Worker:
    """One loaded handler with its context."""

    def load(self, command: dict[str, Any]) -> dict[str, Any]:
        """Import the handler module, find its one class and initialise it.

        Args:
            command: `folder`, `server`, `packages` (folders to import from), `hidden` (top-level names no
                worker has), `rooms` (names of this repository), `context` (source file of the fake).
        """
        folder = Path(command["folder"])
        sys.path[:] = [str(folder), *sys.path, *command["packages"]]
        _hide(frozenset(command["hidden"]), frozenset(command["packages"]))
        os.chdir(folder)
        # TorchServe and Multi Model Server put nothing else on the path: what the archive lacks must fail here.
        for room in command["rooms"]:
            found = importlib.util.find_spec(room)
            if found is not None and not str(found.origin or "").startswith(str(folder)):
                raise ImportError(f"{room} of this repository is on the clean worker's path ({found.origin})")
        manifest = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text(encoding="utf-8"))
        model = manifest["model"]
        module = importlib.import_module(Path(model["handler"].partition(":")[0]).stem)
        classes: list[Any] = [
            member for _, member in inspect.getmembers(module, inspect.isclass) if member.__module__ == module.__name__
        ]
        if len(classes) != 1:
            names = ", ".join(found.__name__ for found in classes) or "none"
            raise ValueError(f"{model['handler']} defines the classes {names}; both servers want exactly one")
        contexts = _source("fake_context", command["context"]).CONTEXTS
        self.context = contexts[command["server"]](
            model["modelName"], str(folder), manifest, command["batch_size"], None
        )
        self.handler = classes[0]()
        self.handler.initialize(self.context)
        engine = getattr(self.handler, "engine", None)
        choice = {name: [made.value, made.reason] for name, made in getattr(engine, "choice", {}).items()}
        return {"loaded": classes[0].__name__, "choice": choice}

    def predict(self, command: dict[str, Any], stream: BinaryIO) -> dict[str, Any]:
        """Answer one batch: `sizes` bytes a picture, which follow on the stream, and `headers` a request."""
        rows = [{"body": bytearray(stream.read(size))} for size in command["sizes"]]
        self.context.begin_batch(command["headers"])
        bodies = self.handler.handle(rows, self.context)
        if not isinstance(bodies, list) or len(bodies) != len(rows):
            got = f"{len(bodies)} answers" if isinstance(bodies, list) else f"a {type(bodies).__name__}"
            raise ValueError(f"the handler returned {got} for {len(rows)} requests; both servers fail such a batch")
        answers = []
        for index, body in enumerate(bodies):
            status, phrase = self.context.get_response_status(index)
            headers = self.context.get_response_headers(index)
            text = body if isinstance(body, str) else json.dumps(body)
            answers.append({"status": status, "phrase": phrase or "", "body": text, "headers": headers})
        return {"answers": answers}


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


def _source(name: str, path: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"_beeline_{name}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
