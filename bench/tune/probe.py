"""One process that times an archive's batches with one number of threads; run as `python -m bench.tune.probe`.

A process of its own, since PyTorch's threads cannot be set anew once they have run. It reads one JSON
object from stdin and writes one JSON line a batch size to stdout, so that whoever stops waiting keeps what
is there.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

# More repeats than this add nothing to a line through six points.
_REPEATS = 5


def main() -> None:
    """Load the model in `folder`, time `batches` with `threads` on `pictures`, for `seconds` at most."""
    asked = json.load(sys.stdin)
    begun = time.perf_counter()
    folder, threads, lone = Path(asked["folder"]), int(asked["threads"]), int(asked["lone"])
    batch, jpegs = _loaded(folder, threads, [Path(path) for path in asked["pictures"]])
    loaded = time.perf_counter()
    # The first passes choose kernels and grow the heap.
    for _ in range(2):
        batch(2)
    for size in asked["batches"]:
        times: list[float] = []
        while len(times) < _REPEATS and (not times or time.perf_counter() - loaded < asked["seconds"]):
            start = time.perf_counter()
            batch(size)
            times.append(1000 * (time.perf_counter() - start))
        _tell({"batch": size, "ms": statistics.median(times)})
        if time.perf_counter() - loaded > asked["seconds"]:
            break
    _tell(_cost(loaded - begun, jpegs))
    second = _second(folder, threads, lone)
    if second is not None:
        _tell(_cost(loaded - begun + second[1], jpegs))


def _cost(seconds: float, jpegs: bool) -> dict[str, Any]:
    """Return what a worker takes that loaded in so many seconds; the last one that is told counts."""
    return {"memory": psutil.Process().memory_info().rss, "load_seconds": seconds, **_device_memory(jpegs)}


def _loaded(folder: Path, threads: int, paths: list[Path]) -> tuple[Callable[[int], None], bool]:
    """Return what decodes so many pictures and runs the model on them as a worker does, and if on a device."""
    from beeline import engines
    from beeline.decoder import Decoder, jpegs_for
    from beeline.settings import Limits
    from beeline.spec import ModelSpec

    spec = ModelSpec.load(folder)
    loaded = engines.load(folder, spec, threads=threads)
    limits = Limits()
    jpegs, _ = jpegs_for(spec.geometry, loaded.choice["device"].value, limits.max_pixels)
    decoder = Decoder(spec.geometry, limits, threads, jpegs)
    bodies = [path.read_bytes() for path in paths]

    def batch(size: int) -> None:
        rows = decoder.decode([bodies[index % len(bodies)] for index in range(size)])
        if rows.good:
            loaded.forward(rows.stack())

    return batch, jpegs is not None


def _second(folder: Path, threads: int, lone: int) -> tuple[Any, float] | None:
    """Return the model that a worker compiles for lone pictures besides, and the seconds that it took; else None.

    It comes after the measurements: a batch of one is timed with the threads of every other.
    """
    from beeline import engines
    from beeline.spec import ModelSpec

    spec = ModelSpec.load(folder)
    if spec.engine != "openvino" or lone <= threads:
        return None
    begun = time.perf_counter()
    loaded = engines.load(folder, spec, threads=lone)
    return loaded, time.perf_counter() - begun


def _device_memory(jpegs: bool) -> dict[str, int]:
    """Return what a worker takes of a CUDA device's memory, and what is free; nothing without one.

    Args:
        jpegs: whether it decodes them there.
    """
    import torch

    from beeline.settings import MAX_PIXELS

    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return {}
    free, total = torch.cuda.mem_get_info()
    # The context itself, which PyTorch does not count; and the largest picture, in bytes and in floats.
    besides = (600 << 20) + (15 * MAX_PIXELS if jpegs else 0)
    return {"device_memory": torch.cuda.max_memory_reserved() + besides, "device_free": min(free, total)}


def _tell(values: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
