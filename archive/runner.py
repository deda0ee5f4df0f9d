"""A `.mar`'s handler in a clean process, without a server: the same code, the real traceback."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from archive import contents, fake_context, isolation, safety, worker_process
from beeline.answer import Answer
from beeline.engines import runtime
from beeline.errors import ArchiveError, Undetermined, did_you_mean
from beeline.spec import CHECKSUMS, FILE_NAME, ModelSpec

SERVERS = ("torchserve", "mms")
BATCH_SIZE = 16
_LOAD_SECONDS = 300.0
_BATCH_SECONDS = 300.0
_TAIL = 2_000


class WorkerTraceback(Exception):
    """The traceback as the worker process printed it; the cause of the `ArchiveError` that it led to."""

    def __str__(self) -> str:
        """Return the worker's traceback."""
        return "\n" + str(self.args[0]).rstrip()


class Runner:
    """Loads an archive in a process of its own and answers batches; a context manager.

    The process sees what a server's worker sees: the unpacked archive and the packages that both servers'
    workers have, and nothing of this repository. Its device and threads come from `BEELINE_DEVICE` and
    `BEELINE_THREADS`, as in a server.
    """

    def __init__(
        self,
        mar: Path,
        server: str = "torchserve",
        batch_size: int = BATCH_SIZE,
        load_seconds: float = _LOAD_SECONDS,
        batch_seconds: float = _BATCH_SECONDS,
    ) -> None:
        """Nothing is started yet.

        Args:
            mar: the archive, or a folder in which it was unpacked already.
            server: whose context the handler gets, `torchserve` or `mms`.
            batch_size: the most pictures that one call of the handler gets.
            load_seconds: how long loading may take.
            batch_seconds: how long one batch may take.

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
        self._seconds = (load_seconds, batch_seconds)
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = bytearray()

    def __enter__(self) -> Runner:
        """Unpack, start the process and load the handler.

        Raises:
            ArchiveError: why it does not load; its cause is the worker's traceback.
        """
        self._scratch = Path(tempfile.mkdtemp(prefix="beeline-runner-"))
        try:
            folder = self.mar
            if not self.mar.is_dir():
                folder = self._scratch / "model"
                folder.mkdir()
                with safety.opened(self.mar) as archive:
                    recorded = CHECKSUMS in archive.namelist()
                if recorded:
                    # Nothing of it runs that its own record does not know. An archive without one is somebody
                    # else's, whose handler may be wanted here for its traceback.
                    contents.read(self.mar)
                safety.unpack(self.mar, folder)
            self._start()
            start = time.monotonic()
            loaded = self._ask(self._load_command(folder), (), self._seconds[0], "does not load")
            self.choice, self.load_time = loaded["choice"], time.monotonic() - start
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
            command = {"do": "predict", "sizes": [len(p) for p in batch], "headers": [headers or {}] * len(batch)}
            reply = self._ask(command, batch, self._seconds[1], "fails on a batch")
            answers += [Answer(**answer) for answer in reply["answers"]]
        return answers

    def close(self) -> None:
        """End the process, at once and with all it started; what it unpacked is removed."""
        if self._process is not None:
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None and not stream.closed:
                    try:
                        stream.close()
                    except BrokenPipeError:
                        continue  # it is gone already, which is what is wanted
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                self._process.poll()
            self._process.wait()
            self._process = None
        shutil.rmtree(self._scratch, ignore_errors=True)

    def log(self) -> str:
        """Return the end of what the worker wrote to its log."""
        path = self._scratch / "log"
        return path.read_text(encoding="utf-8", errors="replace")[-_TAIL:] if path.exists() else ""

    def _start(self) -> None:
        options = ["-I", "-S", "-X", "utf8", *(["-B"] if sys.dont_write_bytecode else [])]
        environment = {key: value for key, value in os.environ.items() if key != "BEELINE_METRICS_DIR"}
        with (self._scratch / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *options, str(Path(worker_process.__file__).resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self._scratch,
                env=environment,
                start_new_session=True,
            )

    def _load_command(self, folder: Path) -> dict[str, Any]:
        return {
            "do": "load",
            "folder": str(folder.resolve()),
            "server": self.server,
            "batch_size": self.batch_size,
            "packages": isolation.package_folders(),
            "hidden": isolation.hidden_packages(_runtime(folder)),
            "rooms": list(isolation.ROOMS),
            "context": str(Path(fake_context.__file__).resolve()),
        }

    def _ask(self, command: dict[str, Any], bodies: Sequence[bytes], seconds: float, what: str) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdin is None:
            raise ArchiveError(f"the runner of {self.mar} is closed; use it inside its `with` block")
        try:
            process.stdin.write(json.dumps(command).encode() + b"\n")
            for body in bodies:
                process.stdin.write(body)
            process.stdin.flush()
            line = self._read_line(process, seconds)
        except BrokenPipeError:
            line = b""
        if not line:
            raise self._died(process, what)
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise self._failed(reply, what)
        return reply

    def _read_line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes:
        """Return the next line of the worker's replies; nothing when it died or takes too long."""
        assert process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise Undetermined(
                    f"the handler of {self.mar} gave no reply within {seconds:g} s; look for an endless loop"
                )
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                return b""
            self._buffer += piece
        line, _, rest = bytes(self._buffer).partition(b"\n")
        self._buffer = bytearray(rest)
        return line

    def _failed(self, reply: dict[str, Any], what: str) -> ArchiveError:
        message = " ".join(str(reply["message"]).split())
        told = message if reply["ours"] else f"{reply['error']}: {message[:300]}"
        hint = ""
        if reply["error"] == "ModuleNotFoundError":
            hint = f"; a worker has {', '.join(isolation.WORKER_PACKAGES)} and what is in the archive"
        error = ArchiveError(f"the handler of {self.mar} {what}: {told}{hint}")
        error.__cause__ = WorkerTraceback(reply["traceback"])
        return error

    def _died(self, process: subprocess.Popen[bytes], what: str) -> ArchiveError:
        code = process.wait()
        ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        error = ArchiveError(f"the handler of {self.mar} {what}: its process ended with {ended}; run it with --debug")
        error.__cause__ = WorkerTraceback(self.log() or "the worker wrote nothing")
        return error


def _runtime(folder: Path) -> tuple[str, ...]:
    """Return the distributions that an unpacked archive's engine and decoding are; of somebody else's, none."""
    if not (folder / FILE_NAME).is_file():
        return ()
    spec = ModelSpec.load(folder)
    return (runtime(spec.engine), *(("torchvision",) if spec.geometry.decoding == "cuda" else ()))
