"""An instance's log files: their last lines, what is added, and why a worker did not start."""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from beeline.errors import BeelineError, did_you_mean

# What workers print; what the server reports; what Java prints before it logs; the supervisor's own.
NAMES = ("worker", "server", "console", "supervisor")

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
    """Yield each line that is added to one of the files, through rotation, for ever."""
    with ExitStack() as stack:
        opened = {path: stack.enter_context(_at_end(path)) for path in files}
        while True:
            quiet = True
            for path, file in opened.items():
                while line := file.readline():
                    quiet = False
                    yield path, line.rstrip("\n")
                if path.exists() and path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                    file.close()
                    opened[path] = stack.enter_context(path.open(encoding="utf-8", errors="replace"))
            if quiet:
                time.sleep(pause)


def failure(folder: Path) -> str | None:
    """Return why workers or the server failed to start, in the log's own words; None where it does not say."""
    for line in reversed(_messages(folder / "worker.log")):
        refusal = _REFUSAL.search(line)
        if refusal:
            return refusal.group(1)
    for line in reversed(_messages(folder / "worker.log")):
        if _ERROR.match(line) and not any(mask in line for mask in _MASKS):
            return line
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


def _at_end(path: Path) -> IO[str]:
    file = path.open(encoding="utf-8", errors="replace")
    file.seek(0, 2)
    return file
