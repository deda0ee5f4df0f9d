"""A batch sweep: what an image costs at batch 1, 2, 4 ... in a worker without a server, stage by stage."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from archive.sandbox import OutOfMemory, Sandbox
from beeline.errors import ArchiveError
from bench.pictures import Pictures
from host import machine
from host.signals import Interrupted

# Each stage includes those before it. `forward` has its batch on the device already; `copied` stacks the decoded rows
# and copies them there; `decoded` begins with the encoded pictures; `handler` is all that a worker does for a batch.
STAGES = {"forward": "forward alone", "copied": "+ copy", "decoded": "+ decode", "handler": "whole handler"}
OUT_OF_MEMORY = "out of memory"
# A record's row: `batch`, `repeats`, `error`, and a timing for each stage, None in a row with an error.
Row = dict[str, Any]
# A doubled batch gains nothing where an image becomes cheaper by this share at most.
PLATEAU = 0.03
# The knee is the smallest batch whose image costs at most this share more than the cheapest one.
NEAR = 0.05
# Seconds after which a worker that loads, or measures one batch size, hangs.
_PATIENCE = 600.0


@dataclass(frozen=True)
class Plan:
    """One sweep: the batch size doubles from 1 until a plateau, but at least to `least` and at most to `most`."""

    archive: Path
    pictures: Pictures
    device: str = "auto"  # as `BEELINE_DEVICE` of a worker
    threads: int = 1  # as `BEELINE_THREADS`
    least: int = 1
    most: int = 256
    repeats: int = 7  # samples of each stage, or as many (three at least) as fit into `seconds`
    seconds: float = 20.0
    mix: int = 16  # pictures of each sample, the same ones at every batch size
    # The worker's limit on the CPU, by default 90 % of the free memory, so that the kernel kills no process.
    memory_mb: int | None = None

    def bodies(self) -> list[bytes]:
        """Return `mix` pictures, taken evenly from all of them; fewer pictures are repeated."""
        bodies = self.pictures.bodies
        count = max(len(bodies), self.mix)
        return [bodies[i * count // self.mix % len(bodies)] for i in range(self.mix)]


@dataclass(frozen=True)
class Fit:
    """milliseconds(n) = a_ms * n + b_ms; `error` is the largest relative difference from a measured point."""

    a_ms: float
    b_ms: float
    error: float

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {name: round(value, 4) for name, value in vars(self).items()}

    def __str__(self) -> str:
        return f"{max(0.0, self.b_ms):.3g} ms fixed and {self.a_ms:.3g} ms an image"


def fit(points: Sequence[tuple[int, float]]) -> Fit | None:
    """Fit the line through points of batch size and a batch's milliseconds; None for fewer than two batch sizes.

    The fit minimises relative differences: in a plain fit the largest batches, of hundreds of ms, would decide alone.
    """
    if len({batch for batch, _ in points}) < 2:
        return None
    sizes, times = np.array(points, float).T
    system = np.stack([sizes, np.ones_like(sizes)], axis=1) / times[:, None]
    (a, b), *_ = np.linalg.lstsq(system, np.ones_like(times), rcond=None)
    return Fit(float(a), float(b), float(np.abs((a * sizes + b) / times - 1).max()))


@contextmanager
def worker(plan: Plan) -> Iterator[tuple[Sandbox, dict[str, Any]]]:
    """Load a plan's archive and its pictures in a sandbox; yield it, and what it says about the model.

    Raise `ArchiveError` for an archive that is not there, was changed, or does not take a picture.
    """
    # A batch of one has as many threads as the others.
    threads = dict.fromkeys(("BEELINE_THREADS", "BEELINE_LONE_THREADS"), str(plan.threads))
    environment = {"BEELINE_DEVICE": plan.device, **threads}
    limit = int(0.9 * machine.free_memory()) if plan.memory_mb is None else plan.memory_mb << 20
    with Sandbox(plan.archive, load_seconds=_PATIENCE, batch_seconds=_PATIENCE, environment=environment) as sandbox:
        about = sandbox.take(plan.bodies(), limit)
        if about["refused"]:
            raise ArchiveError(f"a picture of the mix is refused ({about['refused']}); name ones that the model takes")
        yield sandbox, about


def measure_batch(sandbox: Sandbox, plan: Plan, batch: int) -> Row:
    """Measure one batch size as `Sandbox.time_stages` does; one that does not fit into memory is a row too."""
    try:
        samples = sandbox.time_stages(batch, plan.repeats, plan.seconds)
    except OutOfMemory:
        return {"batch": batch, "error": OUT_OF_MEMORY, "repeats": 0, **dict.fromkeys(STAGES)}
    timings = {stage: timing(batch, samples[stage]) for stage in STAGES}
    return {"batch": batch, "error": None, "repeats": len(samples["forward"]), **timings}


def timing(batch: int, samples: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles of a batch's milliseconds, and the median for one image."""
    low, median, high = np.quantile(samples, (0.25, 0.5, 0.75)).round(4).tolist()
    return {"median_ms": median, "low_ms": low, "high_ms": high, "ms_per_image": round(median / batch, 5)}


def progress(row: Row) -> str:
    """Return a row as one line for people."""
    if row["error"]:
        return f"batch {row['batch']}: {row['error']}"
    costs = (f"{title} {row[stage]['ms_per_image']:.3g}" for stage, title in STAGES.items())
    return f"batch {row['batch']}: ms per image: {', '.join(costs)}"


def end(rows: Sequence[Row], least: int, most: int) -> str | None:
    """Return why the sweep ends after these rows; None where the batch size doubles once more."""
    if rows and rows[-1]["error"]:
        return str(rows[-1]["error"])
    if rows and rows[-1]["batch"] >= least and is_flat(rows):
        return "plateau"
    return f"largest batch asked for ({most})" if 1 << len(rows) > most else None


def is_flat(rows: Sequence[Row]) -> bool:
    """Say whether the last two doublings gained next to nothing, for the forward pass and for the whole handler."""
    gains = [
        1 - larger[stage]["ms_per_image"] / smaller[stage]["ms_per_image"]
        for smaller, larger in list(itertools.pairwise(rows))[-2:]
        for stage in ("forward", "handler")
    ]
    return len(gains) == 4 and max(gains) <= PLATEAU


def knee(rows: Sequence[Row]) -> int | None:
    """Return the smallest batch whose image is nearly as cheap as the cheapest, for the whole handler."""
    costs = {row["batch"]: row["handler"]["ms_per_image"] for row in rows if not row["error"]}
    return next((batch for batch, cost in costs.items() if cost <= min(costs.values()) * (1 + NEAR)), None)


def measure(plan: Plan, watch: Callable[[Row], None] = lambda row: None) -> tuple[dict[str, Any], Interrupted | None]:
    """Sweep in a worker process, which has ended when this returns or raises; `watch` takes each row.

    Return the `sweep` record's result, and the signal that ended the sweep early: then the result has the rows so far.
    Raise `ArchiveError` for an archive that does not load or fails, `Undetermined` for a worker that ended or hangs,
    and `Interrupted` before the first row.
    """
    rows: list[Row] = []
    interruption = None
    with worker(plan) as (sandbox, about):
        try:
            while (ended := end(rows, plan.least, plan.most)) is None:
                rows.append(measure_batch(sandbox, plan, 1 << len(rows)))
                watch(rows[-1])
        except Interrupted as error:
            if not rows:
                raise
            interruption, ended = error, f"interrupted ({error})"
    lines = {
        stage: fit([(row["batch"], row[stage]["median_ms"]) for row in rows if not row["error"]])
        for stage in ("forward", "handler")
    }
    device, reason = sandbox.choice["device"]
    result = {
        **{name: about[name] for name in ("model", "version", "classes")},
        "device": device,
        "precision": sandbox.choice["precision"][0],
        "threads": int(sandbox.choice["threads"][0]),
        "reasons": {name: reason for name, (_, reason) in sandbox.choice.items()},
        "rows": rows,
        "knee": knee(rows),
        "ended": ended,
        "mix": plan.mix,
        "fit": {stage: line and line.to_dict() for stage, line in lines.items()},
        "not_run": [{"what": "CUDA", "why": reason}] if device == "cpu" else [],
    }
    return result, interruption
