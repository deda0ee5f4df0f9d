"""An instance's log files: their last lines, what is added, and why a worker did not start."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import IO

from beeline.errors import BeelineError, did_you_mean

# What workers print; what the server reports; what Java prints before it logs; the supervisor's and the
# prober's own; nginx's errors; a line of JSON a request.
NAMES = ("worker", "server", "console", "supervisor", "gateway", "access")

_PREFIX = re.compile(r"^\d{4}-\d\d-\d\dT[\d:,]+ (?:\[\w+ *\] )?\S+ (.*)$")
_REFUSAL = re.compile(r"refuses to serve: (.+)$")
_ERROR = re.compile(r"^(?:\w+\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt)(?:: .+)?$")
_SERVER = re.compile(r"Failed to (?:load model|bind to address).*|^Invalid configuration: .+|^Caused by: .+")
# What TorchServe prints last hides the cause: it looks for a handler that cannot be imported among its
# own (pytorch/serve#1010), and turns every other error into one of its own.
_MASKS = ("ts.torch_handler.", "RuntimeError: 500 - ")


def paths(folder: Path, name: str | None = None) -> list[Path]:
    """Return the existing log files in `folder`, or the one of that name.

    Raises:
        BeelineError: for a name that is none of `NAMES`, or a file that is not there.
    """
    if name is not None and name not in NAMES:
        raise BeelineError(f"no log is named {name!r}{did_you_mean(name, NAMES)}")
    found = [path for path in (folder / f"{each}.log" for each in NAMES if name in (None, each)) if path.is_file()]
    if not found:
        raise BeelineError(f"{folder} holds no {name or ''} log yet; start a server with `beeline serve up`")
    return found


def tail(path: Path, lines: int) -> list[str]:
    """Return the last lines, without their ends."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return [line.rstrip("\n") for line in deque(file, lines)]


def follow(files: list[Path], pause: float = 0.3) -> Generator[tuple[Path, str], None, None]:
    """Yield each line that is added to one of the files from this call on, through rotation, for ever.

    One may come into being later.
    """
    return _lines([Followed(path) for path in files], pause)


def _lines(followed: Sequence[Followed], pause: float) -> Generator[tuple[Path, str], None, None]:
    try:
        while True:
            quiet = True
            for one in followed:
                for line in one.added():
                    quiet = False
                    yield one.path, line
            if quiet:
                time.sleep(pause)
    finally:
        for one in followed:
            one.close()


def show(folder: Path, names: Sequence[str], write: Callable[[str], object]) -> None:
    """Write what is added to the logs from now on, in a thread that lives as long as this process.

    Args:
        folder: an instance's logs, there or not yet.
        names: some of `NAMES`.
        write: takes each line with its end; an access log's line is JSON and stays as it is.

    Raises:
        BeelineError: for a name that is none of `NAMES`.
    """
    for name in names:
        if name not in NAMES:
            raise BeelineError(f"no log is named {name!r}{did_you_mean(name, NAMES)}")
    lines = follow([folder / f"{name}.log" for name in names])

    def run() -> None:
        for path, line in lines:
            write(f"{line}\n" if path.stem == "access" else f"{path.stem}: {line}\n")

    threading.Thread(target=run, name="logs", daemon=True).start()


def rotate(path: Path, size: int, keep: int) -> bool:
    """Rename `path` to `path.1`, and older ones to the next number, when it is over `size` bytes.

    Args:
        path: the log; whoever writes it must open it anew afterwards.
        size: bytes.
        keep: how many old ones stay.

    Returns:
        Whether it was renamed.
    """
    if not path.is_file() or path.stat().st_size <= size:
        return False
    for number in range(keep - 1, 0, -1):
        older = path.with_name(f"{path.name}.{number}")
        if older.is_file():
            older.replace(path.with_name(f"{path.name}.{number + 1}"))
    path.replace(path.with_name(f"{path.name}.1"))
    return True


def failure(folder: Path) -> str | None:
    """Return why workers or the server failed to start, in the log's own words; None where it does not say."""
    return worker_failure(folder) or _server_failure(folder)


def worker_failure(folder: Path) -> str | None:
    """Return why workers failed to start, in their own words; None where they have not said so yet."""
    for line in reversed(_messages(folder / "worker.log")):
        refusal = _REFUSAL.search(line)
        if refusal:
            return refusal.group(1)
    for line in reversed(_messages(folder / "worker.log")):
        if _ERROR.match(line) and not any(mask in line for mask in _MASKS):
            return line
    return None


def _server_failure(folder: Path) -> str | None:
    for name in ("server.log", "console.log"):
        for line in reversed(_messages(folder / name)):
            found = _SERVER.search(line)
            if found:
                return found.group(0)
    return None


def _messages(path: Path) -> list[str]:
    if not path.is_file():
        return []
    found = []
    for line in tail(path, 2000):
        match = _PREFIX.match(line)
        found.append(match.group(1) if match else line)
    return found


class Followed:
    """One log file: what there is at first is no news; what comes into being later is, from its first line.

    A renamed one is read on for `late` seconds, where whoever writes it keeps some lines back for so long.
    """

    def __init__(self, path: Path, late: float = 0.0) -> None:
        self.path = path
        self.late = late
        self._renamed: float | None = None
        self._file = self._open()
        # What its writer has begun and not ended.
        self._begun = b""
        if self._file is not None:
            self._file.seek(0, os.SEEK_END)

    def added(self) -> Generator[str, None, None]:
        """Yield the lines that were ended since, of the old file and then of the new one where it was rotated."""
        # Looked at first: whatever the old one got before it was renamed is read below.
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
        """Close it."""
        if self._file is not None:
            self._file.close()

    def _open(self) -> IO[bytes] | None:
        try:
            return self.path.open("rb")
        except OSError:
            # Not yet, or just now renamed.
            return None

    def _newer(self) -> IO[bytes] | None:
        """Return the file of that name where it is another than the open one."""
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
