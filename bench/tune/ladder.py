"""The short ladder: what a batch takes by its size, for each number of threads, outside of any server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from archive.sandbox import Sandbox
from beeline.errors import ArchiveError, Undetermined
from bench.pictures import Pictures
from host import machine
from serve.config import LONE
from serve.servers.protocol import MALLOC

SIZES = (1, 2, 4, 8, 16, 32)
# Loading PyTorch and the model may take so long, in seconds.
_PATIENCE = 180.0
_PICTURES = 32


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
    environment = MALLOC | {"OMP_NUM_THREADS": str(threads), "BEELINE_THREADS": str(threads)}
    environment["BEELINE_LONE_THREADS"] = str(threads)
    cost, points = None, 0
    try:
        with Sandbox(folder, load_seconds=_PATIENCE, environment=environment) as sandbox:
            sandbox.take(pictures.bodies[:_PICTURES])
            for reply in sandbox.time_batches(sizes, seconds, lone or min(machine.cores(), LONE)):
                if "batch" in reply:
                    point(int(reply["batch"]), float(reply["ms"]))
                    points += 1
                else:
                    cost = Cost(**reply["cost"])
    except (ArchiveError, Undetermined) as error:
        # What was timed until then counts.
        if not points:
            raise Undetermined(f"the model could not be timed with {threads} threads: {error}") from error
    return cost
