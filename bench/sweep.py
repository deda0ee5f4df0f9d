"""A batch sweep: what an image costs at batch 1, 2, 4 ... in a worker without a server, stage by stage."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
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

# Each includes those before it. `forward` has its batch on the device already; `copied` stacks the decoded rows and
# brings them there; `decoded` begins with the encoded pictures; `handler` is all that a worker does for a batch.
STAGES = {"forward": "forward alone", "copied": "+ copy", "decoded": "+ decode", "handler": "whole handler"}
OUT_OF_MEMORY = "out of memory"
# Doubling the batch must make an image cheaper by more than this, or it gained nothing.
PLATEAU = 0.03
# The knee is the smallest batch whose image costs at most this much more than the cheapest one.
NEAR = 0.05
# Of the memory that is free.
_MOST_MEMORY = 0.9
# Seconds after which a worker that loads, or measures one batch size, has hung.
_PATIENCE = 600.0


@dataclass(frozen=True)
class Plan:
    """One sweep.

    `device` and `threads` are what a worker would get by `BEELINE_DEVICE` and `BEELINE_THREADS`. The batch sizes double
    from 1 until a plateau, but at least to `least` and at most to `most`. Each sample goes through the same `mix`
    pictures, so that rows differ by their batch size alone; a row takes `repeats` samples of each stage, or as many
    (three at least) as fit into `seconds`. `memory_mb` limits the worker on the CPU, None to nine tenths of what is
    free: a batch too large is then a row, and not the kernel ending some process.
    """

    archive: Path
    pictures: Pictures
    device: str = "auto"
    threads: int = 1
    least: int = 1
    most: int = 256
    repeats: int = 7
    seconds: float = 20.0
    mix: int = 16
    memory_mb: int | None = None

    def bodies(self) -> list[bytes]:
        """Return the mix: `mix` pictures, evenly from all of them, or fewer ones again and again."""
        bodies = self.pictures.bodies
        count = max(len(bodies), self.mix)
        return [bodies[i * count // self.mix % len(bodies)] for i in range(self.mix)]


@dataclass(frozen=True)
class Row:
    """One batch size: by stage median and quartiles of a batch's milliseconds and the median for one image, or why not.

    Each stage has the keys `median_ms`, `low_ms`, `high_ms` and `ms_per_image`.
    """

    batch: int
    stages: Mapping[str, Mapping[str, float]]
    repeats: int = 0
    error: str | None = None

    @classmethod
    def of(cls, batch: int, samples: Mapping[str, Sequence[float]]) -> Row:
        """Sum up each stage's samples, the milliseconds of a batch."""
        stages = {}
        for stage in STAGES:
            low, median, high = np.quantile(samples[stage], (0.25, 0.5, 0.75)).round(4).tolist()
            stages[stage] = {"median_ms": median, "low_ms": low, "high_ms": high}
            stages[stage]["ms_per_image"] = round(median / batch, 5)
        return cls(batch, stages, len(samples["forward"]))

    def per_image(self, stage: str) -> float:
        """Return a stage's milliseconds for one image."""
        return self.stages[stage]["ms_per_image"]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; the stages of a row with an error are null."""
        timings = {stage: self.stages.get(stage) for stage in STAGES}
        return {"batch": self.batch, "error": self.error, "repeats": self.repeats, **timings}

    def __str__(self) -> str:
        """Return one line of progress."""
        costs = ", ".join(f"{STAGES[stage]} {self.per_image(stage):.3g}" for stage in self.stages)
        return f"batch {self.batch}: {self.error or f'ms per image: {costs}'}"


@dataclass(frozen=True)
class Fit:
    """milliseconds(n) = a_ms * n + b_ms; `error` is the largest relative difference from a measured point."""

    a_ms: float
    b_ms: float
    error: float

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {name: round(value, 4) for name, value in vars(self).items()}

    def per_image(self, batch: int) -> float:
        """Return the milliseconds of one image in a batch of so many."""
        return self.a_ms + self.b_ms / batch

    def __str__(self) -> str:
        return f"{max(0.0, self.b_ms):.3g} ms fixed and {self.a_ms:.3g} ms an image"


def fit(points: Sequence[tuple[int, float]]) -> Fit | None:
    """Fit the line through points of batch size and a batch's milliseconds; None for fewer than two batch sizes.

    Each weighs by its share: a plain fit would let the largest batches, whose milliseconds are hundreds, decide alone.
    """
    if len({batch for batch, _ in points}) < 2:
        return None
    sizes, times = np.array(points, float).T
    system = np.stack([sizes, np.ones_like(sizes)], axis=1) / times[:, None]
    (a, b), *_ = np.linalg.lstsq(system, np.ones_like(times), rcond=None)
    return Fit(float(a), float(b), float(np.abs((a * sizes + b) / times - 1).max()))


@contextmanager
def worker(plan: Plan) -> Iterator[tuple[Sandbox, dict[str, Any]]]:
    """Load a plan's archive in a sandbox with its pictures; yield it, and what it says of the model.

    Raises:
        ArchiveError: for an archive that is not there, is not as it was built, or does not take a picture.
    """
    # A row of one picture has as many threads as the others.
    threads = dict.fromkeys(("BEELINE_THREADS", "BEELINE_LONE_THREADS"), str(plan.threads))
    environment = {"BEELINE_DEVICE": plan.device, **threads}
    limit = int(machine.free_memory() * _MOST_MEMORY) if plan.memory_mb is None else plan.memory_mb << 20
    with Sandbox(plan.archive, load_seconds=_PATIENCE, batch_seconds=_PATIENCE, environment=environment) as sandbox:
        about = sandbox.take(plan.bodies(), limit)
        if about["refused"]:
            raise ArchiveError(f"a picture of the mix is refused ({about['refused']}); name ones that the model takes")
        yield sandbox, about


def measure_batch(sandbox: Sandbox, plan: Plan, batch: int) -> Row:
    """Measure one batch size; see `Sandbox.time_stages`. A batch that does not fit into memory is a row too."""
    try:
        return Row.of(batch, sandbox.time_stages(batch, plan.repeats, plan.seconds))
    except OutOfMemory:
        return Row(batch, {}, error=OUT_OF_MEMORY)


def end(rows: Sequence[Row], least: int, most: int) -> str | None:
    """Return why these rows are all, None where the next batch size, twice the last, is to be measured."""
    if rows and rows[-1].error is not None:
        return rows[-1].error
    if rows and rows[-1].batch >= least and is_flat(rows):
        return "plateau"
    return f"largest batch asked for ({most})" if 1 << len(rows) > most else None


def is_flat(rows: Sequence[Row]) -> bool:
    """Say whether the last two doublings gained next to nothing, the forward pass alone and the whole handler."""
    steps = list(itertools.pairwise(rows))[-2:]
    gains = [1 - b.per_image(stage) / a.per_image(stage) for a, b in steps for stage in ("forward", "handler")]
    return len(steps) == 2 and max(gains) <= PLATEAU


def knee(rows: Sequence[Row]) -> int | None:
    """Return the smallest batch that is nearly as cheap an image as the cheapest, for the whole handler."""
    costs = {row.batch: row.per_image("handler") for row in rows if row.error is None}
    return next((batch for batch, cost in costs.items() if cost <= min(costs.values()) * (1 + NEAR)), None)


def measure(plan: Plan, watch: Callable[[Row], None] = lambda row: None) -> tuple[dict[str, Any], Interrupted | None]:
    """Sweep in a worker process, which has ended when this returns or raises; `watch` takes each row.

    Returns:
        The `sweep` record's result, and the signal that ended it early; the rows until then are kept.

    Raises:
        ArchiveError: for an archive that does not load or fails. Undetermined: for a worker that ended or hangs.
        Interrupted: when it was interrupted before there was a row.
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
    good = [row for row in rows if row.error is None]
    forward, handler = (
        fit([(row.batch, row.stages[stage]["median_ms"]) for row in good]) for stage in ("forward", "handler")
    )
    device, reason = sandbox.choice["device"]
    result = {
        **{name: about[name] for name in ("model", "version", "classes")},
        "device": device,
        "precision": sandbox.choice["precision"][0],
        "threads": int(sandbox.choice["threads"][0]),
        "reasons": {name: reason for name, (_, reason) in sandbox.choice.items()},
        "rows": [row.to_dict() for row in rows],
        "knee": knee(rows),
        "ended": ended,
        "mix": plan.mix,
        "fit": {"forward": forward and forward.to_dict(), "handler": handler and handler.to_dict()},
        "reference": [dict(reference) for reference in REFERENCES],
        "differences": differences(forward, [row.batch for row in good]),
        "not_run": [{"what": "CUDA", "why": reason}] if device == "cpu" else [],
    }
    return result, interruption


# Milliseconds per image at batch sizes, as users reported them.
REFERENCES: tuple[Mapping[str, Any], ...] = (
    {"what": "ResNet-18, reported by users, worse from batch 64 on", "points": [[8, 17.5], [32, 13.75]]},
    {"what": "ResNet-101, reported by users", "points": [[1, 2.75], [256, 1.02]]},
)


def differences(line: Fit | None, batches: Sequence[int]) -> list[str]:
    """Return a sentence a reference: how and why its shape differs from our forward pass, whose batches cost `line`.

    Nothing is compared where fewer than two of the measured `batches` lie between those of a reference.
    """
    sentences = []
    for reference in REFERENCES:
        (small, before), (large, after) = reference["points"]
        if line is None or sum(small <= batch <= large for batch in batches) < 2:
            sentences.append(
                f"{reference['what']}: fewer than two of our batch sizes lie between {small} and {large}, so the "
                "shapes are not compared; measure more with --least and --most."
            )
            continue
        theirs = fit([(small, small * before), (large, large * after)])
        sentences.append(
            f"{reference['what']}: {before} ms per image at batch {small} and {after} at {large}, {before / after:.2f} "
            f"times faster; ours {line.per_image(small) / line.per_image(large):.2f} times. Only what is fixed is "
            f"spread over more images: a batch of theirs costs {theirs}, one of ours {line}."
        )
    return sentences
