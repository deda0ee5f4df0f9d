"""An instance's log files: their last lines, new lines, and why a worker did not start."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO

from beeline.errors import BeelineError, did_you_mean

# access: one line of JSON a request. console: what else a server prints.
# supervisor: the prober too. gateway: nginx's errors.
NAMES = ("worker", "server", "console", "supervisor", "gateway", "access")

_PREFIX = re.compile(r"^\d{4}-\d\d-\d\dT[\d:,]+ (?:\[\w+ *\] )?(\S+) (.*)$")
_REFUSAL = re.compile(r"refuses to serve: (.+)$")
_ERROR = re.compile(r"^(?:\w+\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt)(?:: .+)?$")
_SERVER = re.compile(r"Failed to (?:load model|bind to address).*|^Invalid configuration: .+|^Caused by: .+")
# TorchServe's last error hides the cause: it looks for a handler that cannot be imported among its own handlers
# (pytorch/serve#1010), and replaces every other error with its own.
_MASKS = ("ts.torch_handler.", "RuntimeError: 500 - ")


def paths(folder: Path, name: str | None = None) -> list[Path]:
    """Return the log files in `folder`, or the one of that name; raise BeelineError if there is none."""
    _check_names([name] if name is not None else [])
    existing = [path for path in (folder / f"{each}.log" for each in NAMES if name in (None, each)) if path.is_file()]
    if not existing:
        raise BeelineError(f"{folder} holds no {name or ''} log yet; start a server with `beeline serve up`")
    return existing


def tail(path: Path, lines: int) -> list[str]:
    """Return the last lines, without their ends."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return [line.rstrip("\n") for line in deque(file, lines)]


def follow(files: list[Path], pause: float = 0.3) -> Generator[tuple[Path, str], None, None]:
    """Yield each line that is added to one of the files after this call, for ever; a file may be missing or rotated."""
    followed = [Followed(path) for path in files]

    def added() -> Generator[tuple[Path, str], None, None]:
        try:
            while True:
                yield from ((one.path, line) for one in followed for line in one.added())
                time.sleep(pause)
        finally:
            for one in followed:
                one.close()

    return added()


def show(folder: Path, names: Sequence[str], write: Callable[[str], object]) -> None:
    """Write each line that is added to the logs after this call, in a thread that lives as long as this process.

    The folder may be missing at first. `write` gets each line with its end and its log's name in front; a line of the
    access log stays JSON. Raise BeelineError if one of `names` is not in `NAMES`.
    """
    _check_names(names)
    lines = follow([folder / f"{name}.log" for name in names])

    def run() -> None:
        for path, line in lines:
            write(f"{line}\n" if path.stem == "access" else f"{path.stem}: {line}\n")

    threading.Thread(target=run, name="logs", daemon=True).start()


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if name not in NAMES:
            raise BeelineError(f"no log is named {name!r}{did_you_mean(name, NAMES)}")


def rotate(path: Path, size: int, keep: int) -> bool:
    """Rename a log of over `size` bytes to `path.1`, and older ones to the next number; keep `keep` old ones.

    Return whether it was renamed: then its writer must open it again.
    """
    if not path.is_file() or path.stat().st_size <= size:
        return False
    with closing(RotatingFileHandler(path, backupCount=keep, delay=True)) as handler:
        handler.doRollover()
    return True


def worker_threads(model: str, version: str) -> str:
    """Return a pattern of the threads that log what a model's workers print: TorchServe's, then MMS's."""
    # MMS shortens a long name.
    return rf"W-(\d+-{re.escape(f'{model}_{version}')}|(\d+-)?{re.escape(model[:25])}(-\d+)?)-std(out|err)"


def failure(folder: Path, threads: str = ".*") -> str | None:
    """Return the log's reason why workers or the server failed to start; None if it has none."""
    if (reason := worker_failure(folder, threads)) is not None:
        return reason
    for name in ("server.log", "console.log"):
        for line in reversed(_messages(folder / name)):
            if match := _SERVER.search(line):
                return match.group(0)
    return None


def worker_failure(folder: Path, threads: str = ".*") -> str | None:
    """Return the reason that a worker logged for its failure; None if none has. `threads` are those of one model."""
    messages = _messages(folder / "worker.log", threads)[::-1]
    errors = (line for line in messages if _ERROR.match(line) and not any(mask in line for mask in _MASKS))
    return refusal(folder, threads) or next(errors, None)


def refusal(folder: Path, threads: str = ".*") -> str | None:
    """Return the reason why a worker refuses its archive; None if none has refused."""
    messages = _messages(folder / "worker.log", threads)[::-1]
    return next((match.group(1) for line in messages if (match := _REFUSAL.search(line))), None)


def _messages(path: Path, threads: str = ".*") -> list[str]:
    """Return the last lines that these threads logged, without the servers' prefixes, and lines without a prefix."""
    lines = tail(path, 2000) if path.is_file() else []
    matches = [(line, _PREFIX.match(line)) for line in lines]
    return [match[2] if match else line for line, match in matches if not match or re.fullmatch(threads, match[1])]


class Followed:
    """Reads the new lines of a log file: of a file that exists those after its end, of a later file all.

    It reads a renamed file for another `late` seconds, because its writer may buffer lines for so long.
    """

    def __init__(self, path: Path, late: float = 0.0) -> None:
        self.path = path
        self.late = late
        self._renamed: float | None = None
        self._file = self._open()
        # The start of a line whose end is not written yet.
        self._begun = b""
        if self._file is not None:
            self._file.seek(0, os.SEEK_END)

    def added(self) -> Generator[str, None, None]:
        """Yield the lines that were completed since the last call: the old file's, then a new file's."""
        # Look first and read then, so that no line is missed that the old file got before it was renamed.
        newer = self._newer()
        yield from self._lines()
        if newer is None:
            return
        self._renamed = self._renamed or time.monotonic()
        if self._file is not None and time.monotonic() - self._renamed < self.late:
            newer.close()
            return
        if self._begun:
            yield _text(self._begun)
        self.close()
        self._file, self._begun, self._renamed = newer, b"", None
        yield from self._lines()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _open(self) -> IO[bytes] | None:
        try:
            return self.path.open("rb")
        except OSError:
            # It does not exist yet, or was just renamed.
            return None

    def _newer(self) -> IO[bytes] | None:
        """Return the file that has the name now, if it is not the open one."""
        file = self._open()
        if file is not None and self._file is not None and os.path.sameopenfile(file.fileno(), self._file.fileno()):
            file.close()
            return None
        return file

    def _lines(self) -> Generator[str, None, None]:
        while self._file is not None and (piece := self._file.readline()):
            self._begun += piece
            if self._begun.endswith(b"\n"):
                line, self._begun = self._begun, b""
                yield _text(line)


def _text(line: bytes) -> str:
    return line.decode("utf-8", errors="replace").rstrip("\n")
