"""The worker process of a ladder: unpacked, started, asked for rows, ended."""

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
import zipfile
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from beeline.errors import ArchiveError, Undetermined
from bench.ladder import worker
from bench.ladder.plan import Plan
from bench.ladder.row import OUT_OF_MEMORY, Row
from host import processes
from serve import store

_FREE = 0.9


class Worker:
    """Loads a plan's archive in a process of its own and measures batch sizes; a context manager.

    `about` is what the worker says of itself: `model`, `version`, `classes`, and `choice` by name (device,
    precision, threads), each a value and its reason.
    """

    def __init__(self, plan: Plan) -> None:
        """Nothing is started yet."""
        self.plan = plan
        self.about: dict[str, Any] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = bytearray()

    def __enter__(self) -> Worker:
        """Unpack the archive, start the process and load the handler.

        Raises:
            ArchiveError: why it does not load. ConfigError: for a device that is not there.
        """
        self._scratch = Path(tempfile.mkdtemp(prefix="beeline-ladder-"))
        try:
            folder = self._unpack()
            pictures = self._pictures()
            self._start()
            reply = self._ask({"do": "load", "folder": str(folder), "pictures": pictures, "memory": self._memory()})
            if "error" in reply:
                raise ArchiveError(f"the handler of {self.plan.archive} does not load: {reply['error']}")
            self.about = reply
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process."""
        self.close()

    def measure(self, batch: int) -> Row:
        """Measure one batch size; a batch that does not fit into memory is a row too.

        Raises:
            ArchiveError: when the handler fails otherwise. Undetermined: when it ends or hangs.
        """
        plan = self.plan
        command = {"do": "measure", "batch": batch, "repeats": plan.repeats, "seconds": plan.seconds}
        try:
            reply = self._ask(command)
        except _Killed:
            # Nobody else ends a worker with SIGKILL than the kernel that ran out of memory.
            return Row(batch, {}, error=OUT_OF_MEMORY)
        if reply.get("memory"):
            return Row(batch, {}, error=OUT_OF_MEMORY)
        if "error" in reply:
            raise ArchiveError(f"the handler of {plan.archive} fails on a batch of {batch}: {reply['error']}")
        return Row.of(batch, reply["samples"])

    def close(self) -> None:
        """End the process, at once and with all it started; what was unpacked is removed."""
        process, self._process = self._process, None
        if process is not None:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                process.poll()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    try:
                        stream.close()
                    except BrokenPipeError:
                        continue  # it is gone already, which is what is wanted
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _unpack(self) -> Path:
        """Unpack the archive, after every file in it was compared with the archive's own record."""
        path = self.plan.archive.resolve()
        folder = self._scratch / "model"
        # Only a path that ends so is taken for one, not for a name in a store.
        if path.suffix != ".mar":
            raise ArchiveError(f"{self.plan.archive} is no .mar file; build one with `beeline archive build`")
        found = store.find(path.parent, (str(path),))[0]
        with zipfile.ZipFile(found.path) as archive:
            archive.extractall(folder)
        return folder

    def _pictures(self) -> list[str]:
        folder = self._scratch / "pictures"
        folder.mkdir()
        paths = []
        for index, body in enumerate(self.plan.bodies()):
            path = folder / str(index)
            path.write_bytes(body)
            paths.append(str(path))
        return paths

    def _memory(self) -> int:
        """Return how many bytes the worker may take on the CPU."""
        if self.plan.memory_mb is not None:
            return self.plan.memory_mb << 20
        return int(psutil.virtual_memory().available * _FREE)

    def _start(self) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "BEELINE_METRICS_DIR"}
        environment |= {"BEELINE_DEVICE": self.plan.device, "BEELINE_THREADS": str(self.plan.threads)}
        # A row of one picture has as many as the others.
        environment["BEELINE_LONE_THREADS"] = environment["BEELINE_THREADS"]
        with (self._scratch / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-X", "utf8", str(Path(worker.__file__).resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self._scratch,
                env=environment,
                start_new_session=True,
                preexec_fn=processes.ending_with_parent(signal.SIGKILL),
            )

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdin is None:
            raise Undetermined(f"the worker of {self.plan.archive} is closed; use it inside its `with` block")
        try:
            process.stdin.write(json.dumps(command).encode() + b"\n")
            process.stdin.flush()
            line = self._read_line(process)
        except BrokenPipeError:
            line = b""
        if not line:
            code = process.wait()
            if code == -signal.SIGKILL and command["do"] == "measure":
                raise _Killed
            tail = " ".join((self._scratch / "log").read_text(encoding="utf-8", errors="replace").split())[-300:]
            raise Undetermined(f"the worker of {self.plan.archive} ended with {code}; its log's end: {tail or 'empty'}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _read_line(self, process: subprocess.Popen[bytes]) -> bytes:
        """Return the next line of the worker's replies; nothing when it ended."""
        assert process.stdout is not None
        deadline = time.monotonic() + self.plan.patience
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise Undetermined(
                    f"the handler of {self.plan.archive} gave no reply within {self.plan.patience:g} s; "
                    "allow a smaller largest batch with --most"
                )
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                return b""
            self._buffer += piece
        line, _, rest = bytes(self._buffer).partition(b"\n")
        self._buffer = bytearray(rest)
        return line


class _Killed(Exception):
    """The worker was ended by SIGKILL."""
