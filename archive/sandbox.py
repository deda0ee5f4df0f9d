"""The handler of a `.mar` in a clean process without a server: it predicts, is timed, and shows its own traceback."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from archive import mar as reader
from beeline.answer import Answer
from beeline.engines import runtime
from beeline.errors import ArchiveError, Undetermined, did_you_mean, short
from beeline.metrics import FOLDER
from beeline.spec import CHECKSUMS, FILE_NAME, ModelSpec
from host import processes

SERVERS = ("torchserve", "mms")
# What every worker has: the packages that handlers/ imports, and psutil, which both servers require. Some archives also
# need the runtime of an engine, or torchvision for JPEGs on a CUDA device.
WORKER_PACKAGES = ("torch", "numpy", "pillow", "psutil")
# What `make simd` installs instead of Pillow.
_PILLOW_SIMD = ("pillow-simd", "pillow-avif-plugin")
_SECONDS = 300.0
_TAIL = 2_000
_NAME = re.compile(r"[A-Za-z0-9._-]+")


class WorkerTraceback(Exception):
    """The traceback that the worker process printed; the cause of an `ArchiveError`."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0]).rstrip()


class OutOfMemory(ArchiveError):
    """A batch does not fit into memory: the handler says so, or the kernel kills the process."""


class Sandbox:
    """A context manager that loads an archive in its own process, answers batches and times them.

    The process sees what a server's worker sees: the unpacked archive, and the packages that workers of both servers
    have, but nothing of this repository. Its device and threads come from `BEELINE_DEVICE` and `BEELINE_THREADS`, as
    in a server. `choice` has device, precision, threads and so on, each a value and its reason; `load_time` is in
    seconds, those of the process's start included.
    """

    def __init__(
        self,
        mar: Path,
        server: str = "torchserve",
        batch_size: int = 16,
        load_seconds: float = _SECONDS,
        batch_seconds: float = _SECONDS,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare; `with` starts the process.

        `server` says whose context the handler gets, `torchserve` or `mms`. One call of the handler gets at most
        `batch_size` pictures. Loading may take `load_seconds`, and a batch or a measurement `batch_seconds`.
        `environment` is added to this process's own.
        """
        if server not in SERVERS:
            raise ArchiveError(f"the server is {server!r}{did_you_mean(server, SERVERS)}")
        self.mar, self.server, self.batch_size = mar, server, batch_size
        self.choice, self.load_time = dict[str, list[str]](), 0.0
        self._seconds = (load_seconds, batch_seconds)
        self._environment = {key: value for key, value in os.environ.items() if key != FOLDER}
        self._environment |= environment or {}
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = bytearray()

    def __enter__(self) -> Sandbox:
        """Unpack, start the process and load the handler, which replays its golden pictures.

        Raise `ArchiveError` if it does not load; the cause is the worker's traceback.
        """
        self._scratch = Path(tempfile.mkdtemp(prefix="beeline-sandbox-"))
        try:
            folder = self._scratch / "model"
            folder.mkdir()
            with reader.opened(self.mar) as archive:
                built_here = CHECKSUMS in archive.namelist()
            # The handler of another archive runs too: somebody may want to see its traceback.
            if built_here:
                reader.check(self.mar)
            reader.unpack(self.mar, folder)
            start = time.monotonic()
            options = ["-I", "-S", "-X", "utf8", *(["-B"] if sys.dont_write_bytecode else [])]
            command = [sys.executable, *options, str(Path(__file__).resolve().with_name("sandbox_worker.py"))]
            self._process = processes.start_group(command, self._scratch / "log", self._scratch, self._environment)
            imports = {"packages": package_folders(), "hidden": hidden_packages(_runtime(folder))}
            context = {"folder": str(folder.resolve()), "server": self.server, "batch_size": self.batch_size}
            self._send({"do": "load", **context, **imports})
            self.choice = self._reply("does not load", self._seconds[0])["choice"]
            self.load_time = time.monotonic() - start
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def predict(self, pictures: Sequence[bytes]) -> list[Answer]:
        """Answer encoded pictures, `batch_size` at a time, each as the raw body of a request.

        Raise `ArchiveError` when the handler does, or returns another number of answers; the cause is its traceback.
        """
        answers: list[Answer] = []
        for start in range(0, len(pictures), self.batch_size):
            self._send({"do": "predict"}, pictures[start : start + self.batch_size])
            answers += [Answer(**answer) for answer in self._reply("fails on a batch")["answers"]]
        return answers

    def take(self, pictures: Sequence[bytes], memory: int | None = None) -> dict[str, Any]:
        """Set the encoded pictures to time from now on, and the bytes that the process may allocate on the CPU.

        Return `model`, `version`, `classes` (the number of labels), and `refused`: the model's reason against the first
        picture that it refuses, or None. Raise `ArchiveError` for a handler without the project's stages.
        """
        self._send({"do": "pictures", "memory": memory}, pictures)
        return self._reply("cannot be timed")

    def time_stages(self, batch: int, repeats: int, seconds: float) -> dict[str, list[float]]:
        """Time forward pass, copies, decoding and the whole handler at one batch size.

        Return by stage `repeats` samples or, after `seconds`, at least three. Each is the mean milliseconds of a batch
        over one pass through the pictures. Raise `OutOfMemory` when the batch does not fit, `ArchiveError` when the
        handler fails otherwise, `Undetermined` when its process ends or hangs.
        """
        self._send({"do": "stages", "batch": batch, "repeats": repeats, "seconds": seconds})
        samples: dict[str, list[float]] = self._timed(f"fails on a batch of {batch}")["samples"]
        return samples

    def time_batches(self, batch_sizes: Sequence[int], seconds: float, lone: int) -> Iterator[dict[str, Any]]:
        """Time decoding and the forward pass at each batch size in turn, for `seconds`; it raises as `time_stages`.

        Yield `batch` and its median `ms`, one size at a time. Then `cost`: `memory` in bytes, `load_seconds`, and on a
        CUDA device `device_memory` and `device_free`. If a worker holds a second model with `lone` threads for pictures
        that come alone, `cost` again with that model.
        """
        self._send({"do": "batches", "batch_sizes": list(batch_sizes), "seconds": seconds, "lone": lone})
        while not (reply := self._timed("fails on a batch")).get("end"):
            yield reply

    def close(self) -> None:
        """End the process and everything that it started, and remove the unpacked files."""
        if self._process is not None:
            processes.end_group(self._process)
            self._process = None
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _send(self, command: dict[str, Any], bodies: Sequence[bytes] = ()) -> None:
        stream = self._running().stdin
        assert stream is not None
        try:
            stream.write(json.dumps({**command, "sizes": [len(body) for body in bodies]}).encode() + b"\n")
            for body in bodies:
                stream.write(body)
            stream.flush()
        except BrokenPipeError:
            return  # The process ended; `_reply` says so.

    def _timed(self, what: str) -> dict[str, Any]:
        """Return the reply to a measurement. If the process ends, but not for lack of memory, nothing is determined."""
        try:
            return self._reply(what, fix="allow a smaller largest batch with --most")
        except _Ended as error:
            raise Undetermined(str(error)) from error.__cause__

    def _reply(self, what: str, seconds: float | None = None, fix: str = "look for an endless loop") -> dict[str, Any]:
        process = self._running()
        line = self._read_line(process, seconds or self._seconds[1], fix)
        if not line:
            raise self._died(process, what)
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise self._failed(reply, what)
        return reply

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ArchiveError(f"the sandbox of {self.mar} is closed; use it inside its `with` block")
        return self._process

    def _read_line(self, process: subprocess.Popen[bytes], seconds: float, fix: str) -> bytes:
        """Return the next line of the worker's replies; nothing if the worker ended."""
        assert process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise Undetermined(f"the handler of {self.mar} gave no reply within {seconds:g} s; {fix}")
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                return b""
            self._buffer += piece
        line, _, rest = bytes(self._buffer).partition(b"\n")
        self._buffer = bytearray(rest)
        return line

    def _failed(self, reply: dict[str, Any], what: str) -> ArchiveError:
        # A file of the archive is named as the archive names it.
        message = short(reply["message"], 2_000).replace(f"{(self._scratch / 'model').resolve()}{os.sep}", "")
        reason = message if reply["ours"] else f"{reply['error']}: {message[:300]}"
        hint = ""
        if reply["error"] == "ModuleNotFoundError":
            hint = f"; a worker has {', '.join(WORKER_PACKAGES)} and what is in the archive"
        kind = OutOfMemory if reply["memory"] else ArchiveError
        error = kind(f"the handler of {self.mar} {what}: {reason}{hint}")
        error.__cause__ = WorkerTraceback(reply["traceback"])
        return error

    def _died(self, process: subprocess.Popen[bytes], what: str) -> ArchiveError:
        code = process.wait()
        ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        # SIGKILL comes from a kernel that ran out of memory.
        kind = OutOfMemory if code == -signal.SIGKILL else _Ended
        error = kind(f"the handler of {self.mar} {what}: its process ended with {ended}; run it with --debug")
        log = (self._scratch / "log").read_text(encoding="utf-8", errors="replace")[-_TAIL:]
        error.__cause__ = WorkerTraceback(log or "the worker wrote nothing")
        return error


class _Ended(ArchiveError):
    """The process ended, and not for lack of memory."""


def package_folders() -> list[str]:
    """Return the folders of installed packages from which this process imports, without this repository's."""
    installed = {str(Path(folder).resolve()) for folder in (*site.getsitepackages(), site.getusersitepackages())}
    return [folder for folder in sys.path if folder and str(Path(folder).resolve()) in installed]


def hidden_packages(runtime: Iterable[str] = ()) -> list[str]:
    """Return the top-level imports that are installed here but not in a worker with the packages of `runtime`."""
    installed = owners()
    # Some runtimes have several distributions, such as onnxruntime and onnxruntime-gpu.
    needed = (owner for name in runtime for owner in installed.get(name, {name}))
    allowed = _with_requirements((*WORKER_PACKAGES, *_PILLOW_SIMD, *needed))
    return sorted(name for name, by in installed.items() if not any(_normal(owner) in allowed for owner in by))


def owners() -> dict[str, set[str]]:
    """Return the distributions of each top-level import. Python 3.10's own function leaves out most wheels."""
    names: dict[str, set[str]] = {}
    for distribution in metadata.distributions():
        declared = set((distribution.read_text("top_level.txt") or "").split())
        # Listing the files of a package takes long, torch has 15,000.
        files = [] if declared else [file for file in distribution.files or () if file.suffix == ".py"]
        for name in declared or {file.parts[0] if len(file.parts) > 1 else file.stem for file in files}:
            if name.isidentifier():
                names.setdefault(name, set()).add(distribution.metadata["Name"])
    return names


def _with_requirements(names: Iterable[str]) -> set[str]:
    """Return these distributions and everything they require, without extras."""
    known: set[str] = set()
    waiting = [_normal(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name not in known:
            known.add(name)
            with suppress(metadata.PackageNotFoundError):
                lines = [line for line in metadata.requires(name) or [] if "extra ==" not in line]
                waiting += [_normal(match.group()) for match in map(_NAME.match, lines) if match]
    return known


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _runtime(folder: Path) -> tuple[str, ...]:
    """Return the packages of an unpacked archive's engine and decoding; none if Beeline did not build the archive."""
    if not (folder / FILE_NAME).is_file():
        return ()
    spec = ModelSpec.load(folder)
    return (runtime(spec.engine), *(("torchvision",) if spec.geometry.decoding == "cuda" else ()))
