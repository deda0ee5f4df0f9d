"""The short ladder: what a batch takes by its size, for each number of threads, outside of any server."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from beeline.errors import Undetermined
from bench.pictures import Pictures
from host import ROOT, machine, processes
from serve.config import LONE
from serve.servers.protocol import MALLOC, clean

SIZES = (1, 2, 4, 8, 16, 32)
# Loading PyTorch and the model may take so long, in seconds.
_PATIENCE = 180.0


@dataclass(frozen=True)
class Cost:
    """What one worker takes: bytes of memory, seconds to load, bytes of a CUDA device's memory; what that has free."""

    memory: int
    load_seconds: float
    device_memory: int = 0
    device_free: int = 0


# Of a worker that nobody could ask.
UNKNOWN = Cost(memory=1 << 30, load_seconds=6.0)


def climb(
    folder: Path,
    pictures: Pictures,
    threads: int,
    seconds: float,
    point: Callable[[int, float], None],
    sizes: Sequence[int] = SIZES,
    lone: int | None = None,
) -> Cost | None:
    """Time batches of each size with so many threads, in a process of its own.

    Args:
        folder: the unpacked archive.
        pictures: what is decoded.
        threads: of the engine and the decoder.
        seconds: how long to measure, loading aside; larger sizes are left out when it is over.
        point: takes each size and its milliseconds as they come.
        sizes: of the batches.
        lone: threads for a picture that comes alone, for which a worker may hold a second model; None for the default.

    Returns:
        What the process cost; None when it ended before it told.

    Raises:
        Undetermined: when not one size was timed, with what the process said last.
    """
    with tempfile.TemporaryDirectory(prefix="beeline-tune-") as scratch:
        paths = _written(pictures, Path(scratch))
        told = {"folder": str(folder), "threads": threads, "pictures": paths, "batches": sizes, "seconds": seconds}
        told["lone"] = lone or min(machine.cores(), LONE)
        log = Path(scratch) / "log"
        with _started(threads, log) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(told).encode())
                process.stdin.close()
            cost, points = None, 0
            for line in _lines(process, time.monotonic() + _PATIENCE + 3 * seconds):
                values = json.loads(line)
                if "batch" in values:
                    point(int(values["batch"]), float(values["ms"]))
                    points += 1
                else:
                    cost = Cost(**values)
        if not points:
            said = " ".join(log.read_text(encoding="utf-8", errors="replace").split())[-300:]
            raise Undetermined(f"the model could not be timed with {threads} threads: {said or 'no word of it'}")
        return cost


def _written(pictures: Pictures, folder: Path) -> list[str]:
    paths = []
    for index, body in enumerate(pictures.bodies[:32]):
        path = folder / str(index)
        path.write_bytes(body)
        paths.append(str(path))
    return paths


@contextlib.contextmanager
def _started(threads: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start the process with a worker's environment; it is gone after the block, whatever happens."""
    environment = clean(os.environ) | MALLOC | {"OMP_NUM_THREADS": str(threads), "BEELINE_THREADS": str(threads)}
    environment["BEELINE_LONE_THREADS"] = str(threads)
    with log.open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.tune.probe"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
            preexec_fn=processes.ending_with_parent(signal.SIGKILL),
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def _lines(process: subprocess.Popen[bytes], deadline: float) -> Iterator[bytes]:
    """Yield the process's lines until it ends or time is up."""
    assert process.stdout is not None
    buffer = b""
    while True:
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        piece = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
        if not piece:
            return
        *whole, buffer = (buffer + piece).split(b"\n")
        yield from whole
