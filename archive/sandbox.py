"""A `.mar`'s handler in a clean process, without a server: it predicts, shows its real traceback, and is timed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from archive import mar as reader
from beeline.answer import Answer
from beeline.engines import runtime
from beeline.errors import ArchiveError, BeelineError, Undetermined, did_you_mean
from beeline.metrics import FOLDER
from beeline.spec import CHECKSUMS, FILE_NAME, ModelSpec
from host import processes

SERVERS = ("torchserve", "mms")
BATCH_SIZE = 16
# What the code in any archive may import: what handlers/ imports, and psutil, which both servers require. An engine's
# runtime, and torchvision for JPEGs on a CUDA device, are added for the archives that need them.
WORKER_PACKAGES = ("torch", "numpy", "pillow", "psutil")
# Where Pillow-SIMD is installed it brings the import PIL, and needs a plugin for AVIF.
_PILLOW_SIMD = ("pillow-simd", "pillow-avif-plugin")
_LOAD_SECONDS = 300.0
_BATCH_SECONDS = 300.0
_TAIL = 2_000
_NAME = re.compile(r"[A-Za-z0-9._-]+")


class WorkerTraceback(Exception):
    """The traceback as the worker process printed it; the cause of the `ArchiveError` that it led to."""

    def __str__(self) -> str:
        """Return the worker's traceback."""
        return "\n" + str(self.args[0]).rstrip()


class OutOfMemory(ArchiveError):
    """A batch that did not fit into memory: the handler said so, or the kernel ended the process."""


class Sandbox:
    """Loads an archive in a process of its own, answers batches and times them; a context manager.

    The process sees what a server's worker sees: the unpacked archive and the packages that both servers'
    workers have, and nothing of this repository. Its device and threads come from `BEELINE_DEVICE` and
    `BEELINE_THREADS`, as in a server.

    Attributes:
        choice: device, precision, threads ..., each a value and its reason.
        load_time: seconds, those of the process's start included.
    """

    def __init__(
        self,
        mar: Path,
        server: str = "torchserve",
        batch_size: int = BATCH_SIZE,
        load_seconds: float = _LOAD_SECONDS,
        batch_seconds: float = _BATCH_SECONDS,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Nothing is started yet.

        Args:
            mar: the archive, or a folder in which it was unpacked already.
            server: whose context the handler gets, `torchserve` or `mms`.
            batch_size: the most pictures that one call of the handler gets.
            load_seconds: how long loading may take.
            batch_seconds: how long one batch, or one measurement, may take.
            environment: over this process's own.

        Raises:
            ArchiveError: for an unknown server.
        """
        if server not in SERVERS:
            raise ArchiveError(f"the server is {server!r}{did_you_mean(server, SERVERS)}")
        self.mar = mar
        self.server = server
        self.batch_size = batch_size
        self.choice: dict[str, list[str]] = {}
        self.load_time = 0.0
        self._load_seconds, self._batch_seconds = load_seconds, batch_seconds
        self._environment = {key: value for key, value in os.environ.items() if key != FOLDER}
        self._environment |= environment or {}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Sandbox:
        """Unpack, start the process and load the handler, which replays its golden pictures.

        Raises:
            ArchiveError: why it does not load; its cause is the worker's traceback.
        """
        self._scratch = Path(tempfile.mkdtemp(prefix="beeline-sandbox-"))
        try:
            folder = self.mar
            if not self.mar.is_dir():
                folder = self._scratch / "model"
                folder.mkdir()
                with reader.opened(self.mar) as archive:
                    recorded = CHECKSUMS in archive.namelist()
                if recorded:
                    # No file runs that the archive's record does not list. An archive without a record was not
                    # built by Beeline; the user may want its handler's traceback.
                    reader.check(self.mar)
                reader.unpack(self.mar, folder)
            start = time.monotonic()
            self._start()
            self._send(
                "load",
                folder=str(folder.resolve()),
                server=self.server,
                batch_size=self.batch_size,
                context=str(_torchserve_context()),
                packages=package_folders(),
                hidden=hidden_packages(_runtime(folder)),
            )
            self.choice = self._reply("does not load", self._load_seconds)["choice"]
            self.load_time = time.monotonic() - start
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process."""
        self.close()

    def predict(self, pictures: Sequence[bytes], headers: dict[str, str] | None = None) -> list[Answer]:
        """Answer pictures, `batch_size` at a time, each as the raw body of a request.

        Args:
            pictures: encoded pictures.
            headers: request headers, the same for each.

        Raises:
            ArchiveError: when the handler raises or returns another number of answers; its cause is the
                worker's traceback.
        """
        answers: list[Answer] = []
        for start in range(0, len(pictures), self.batch_size):
            batch = pictures[start : start + self.batch_size]
            self._send("predict", bodies=list(batch), headers=[headers or {}] * len(batch))
            answers += [Answer(**answer) for answer in self._reply("fails on a batch")["answers"]]
        return answers

    def take(self, pictures: Sequence[bytes], memory: int | None = None) -> dict[str, Any]:
        """Take the pictures that are timed from now on.

        Args:
            pictures: encoded pictures.
            memory: bytes that the process may take on the CPU; None for no limit.

        Returns:
            `model`, `version`, `classes`, the number of labels, and `refused`: what the model says against the
            first picture that it does not take, or None.

        Raises:
            ArchiveError: for a handler without the project's stages.
        """
        self._send("pictures", bodies=list(pictures), memory=memory)
        return self._reply("cannot be timed")

    def time_stages(self, batch: int, repeats: int, seconds: float) -> dict[str, list[float]]:
        """Time forward pass, copies, decoding and the whole handler at one batch size.

        Args:
            batch: the pictures of a batch.
            repeats: the samples of each stage.
            seconds: after which three of them are enough.

        Returns:
            By stage, each sample the mean milliseconds of a batch over one pass of the pictures.

        Raises:
            OutOfMemory: when it does not fit. ArchiveError: when the handler fails otherwise. Undetermined: when
                its process ends or hangs.
        """
        self._send("stages", batch=batch, repeats=repeats, seconds=seconds)
        samples: dict[str, list[float]] = self._timed(f"fails on a batch of {batch}")["samples"]
        return samples

    def time_batches(self, batch_sizes: Sequence[int], seconds: float, lone: int) -> Iterator[dict[str, Any]]:
        """Time decoding and the forward pass at each batch size.

        Args:
            batch_sizes: in this order.
            seconds: for all of them; larger sizes are left out after that.
            lone: threads of a picture that comes alone, for which a worker may hold a second model.

        Yields:
            `batch` and its median `ms`, as they come; then `cost`: `memory` in bytes, `load_seconds`, and on a CUDA
            device `device_memory` and `device_free`; where there is a second model, `cost` with it again.

        Raises:
            As `time_stages`.
        """
        self._send("batches", batch_sizes=list(batch_sizes), seconds=seconds, lone=lone)
        while not (reply := self._timed("fails on a batch")).get("end"):
            yield reply

    def close(self) -> None:
        """End the process, at once and with all it started; what it unpacked is removed."""
        if self._process is not None:
            self._commands.close()
            self._replies.close()
            processes.end_group(self._process)
            self._process = None
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _start(self) -> None:
        options = ["-I", "-S", "-X", "utf8", *(["-B"] if sys.dont_write_bytecode else [])]
        worker = Path(__file__).resolve().with_name("sandbox_worker.py")
        command = [sys.executable, *options, str(worker)]
        self._process = processes.start_group(command, self._scratch / "log", self._scratch, self._environment)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._commands = Connection(os.dup(self._process.stdin.fileno()), readable=False)
        self._replies = Connection(os.dup(self._process.stdout.fileno()), writable=False)

    def _send(self, command: str, **arguments: Any) -> None:
        try:
            self._commands.send({"do": command, **arguments})
        except BrokenPipeError:
            return  # The process ended, which the reply says.

    def _timed(self, what: str) -> dict[str, Any]:
        """Return a measurement's reply; when the process ends for another reason than memory, nothing was measured."""
        return self._reply(what, fix="allow a smaller largest batch with --most", ended=Undetermined)

    def _reply(
        self,
        what: str,
        seconds: float | None = None,
        fix: str = "look for an endless loop",
        ended: type[BeelineError] = ArchiveError,
    ) -> dict[str, Any]:
        seconds = seconds or self._batch_seconds
        if not self._replies.poll(seconds):
            raise Undetermined(f"the handler of {self.mar} gave no reply within {seconds:g} s; {fix}")
        try:
            reply: dict[str, Any] = json.loads(self._replies.recv_bytes())
        except (EOFError, OSError):
            raise self._died(what, ended) from WorkerTraceback(self._log() or "the worker wrote nothing")
        if "error" in reply:
            raise self._failed(reply, what) from WorkerTraceback(reply["traceback"])
        return reply

    def _failed(self, reply: dict[str, Any], what: str) -> ArchiveError:
        message = " ".join(str(reply["message"]).split())
        why = message if reply["ours"] else f"{reply['error']}: {message[:300]}"
        hint = ""
        if reply["error"] == "ModuleNotFoundError":
            hint = f"; a worker has {', '.join(WORKER_PACKAGES)} and what is in the archive"
        kind = OutOfMemory if reply["memory"] else ArchiveError
        return kind(f"the handler of {self.mar} {what}: {why}{hint}")

    def _died(self, what: str, ended: type[BeelineError]) -> BeelineError:
        assert self._process is not None
        code = self._process.wait()
        end = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        # Only the kernel, out of memory, ends a worker with SIGKILL.
        kind = OutOfMemory if code == -signal.SIGKILL else ended
        return kind(f"the handler of {self.mar} {what}: its process ended with {end}; run it with --debug")

    def _log(self) -> str:
        """Return the end of what the worker wrote to stderr."""
        return (self._scratch / "log").read_text(encoding="utf-8", errors="replace")[-_TAIL:]


def package_folders() -> list[str]:
    """Return the folders of installed packages that this process imports from; none of this repository."""
    installed = {str(Path(folder).resolve()) for folder in (*site.getsitepackages(), site.getusersitepackages())}
    return [folder for folder in sys.path if folder and str(Path(folder).resolve()) in installed]


def hidden_packages(runtime: Iterable[str] = ()) -> list[str]:
    """Return the top-level names that are installed here but that no worker can count on.

    Args:
        runtime: what the archive's engine imports besides `WORKER_PACKAGES`.
    """
    installed = owners()
    # Some runtimes come in several distributions, as onnxruntime and onnxruntime-gpu.
    needed = (owner for name in runtime for owner in installed.get(name, {name}))
    allowed = _with_requirements((*WORKER_PACKAGES, *_PILLOW_SIMD, *needed))
    return sorted(
        name for name, owned_by in installed.items() if not any(_normal(each) in allowed for each in owned_by)
    )


def owners() -> dict[str, set[str]]:
    """Return which distributions bring each top-level import.

    `importlib.metadata.packages_distributions` of Python 3.10 leaves out most wheels.
    """
    names: dict[str, set[str]] = {}
    for distribution in metadata.distributions():
        declared = set((distribution.read_text("top_level.txt") or "").split())
        files = [file for file in distribution.files or () if file.suffix == ".py"]
        for name in declared or {file.parts[0] if len(file.parts) > 1 else file.stem for file in files}:
            if name.isidentifier():
                names.setdefault(name, set()).add(distribution.metadata["Name"])
    return names


def _with_requirements(names: Iterable[str]) -> set[str]:
    """Return these distributions with everything they require, extras left out."""
    known: set[str] = set()
    waiting = [_normal(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in known:
            continue
        known.add(name)
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for line in lines:
            match = _NAME.match(line)
            if match and "extra ==" not in line:
                waiting.append(_normal(match.group()))
    return known


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _runtime(folder: Path) -> tuple[str, ...]:
    """Return the packages that the archive's engine and decoding need; none for archives that others built."""
    if not (folder / FILE_NAME).is_file():
        return ()
    spec = ModelSpec.load(folder)
    return (runtime(spec.engine), *(("torchvision",) if spec.geometry.decoding == "cuda" else ()))


def _torchserve_context() -> Path:
    """Return the file of TorchServe's context class, which imports nothing but the standard library."""
    package = importlib.util.find_spec("ts")
    if package is None or package.origin is None:
        raise Undetermined("TorchServe, whose context the handler gets, is not installed here; run `make setup`")
    return Path(package.origin).with_name("context.py")
