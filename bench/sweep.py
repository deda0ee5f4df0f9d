"""A batch sweep: what an image costs at batch 1, 2, 4 ... in a worker without a server, stage by stage."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from archive import store
from archive.sandbox import OutOfMemory, Sandbox
from beeline.errors import ArchiveError, ConfigError
from bench.pictures import Pictures
from host import machine
from host.report import number
from host.signals import Interrupted

# Each stage includes those before it. `forward` has its batch on the device already; `copied` stacks the decoded rows
# and brings them there; `decoded` begins with the encoded pictures; `handler` is all that a worker does for a batch.
STAGES = ("forward", "copied", "decoded", "handler")
TITLES = {"forward": "forward alone", "copied": "+ copy", "decoded": "+ decode", "handler": "whole handler"}
OUT_OF_MEMORY = "out of memory"
# Doubling the batch must make an image cheaper by more than this, or it gained nothing.
PLATEAU = 0.03
# The knee is the smallest batch whose image costs at most this much more than the cheapest one.
NEAR = 0.05
# Of the memory that is free.
_MOST_MEMORY = 0.9


@dataclass(frozen=True)
class Plan:
    """One sweep.

    `device` and `threads` are what a worker would get by `BEELINE_DEVICE` and `BEELINE_THREADS`. The batch sizes double
    from 1 until a plateau, but at least to `least` and at most to `most`. Each sample goes through the same `mix`
    pictures, so that rows differ by their batch size alone; a row takes `repeats` samples of each stage, or as many
    (three at least) as fit into `seconds`. `memory_mb` limits the worker on the CPU, None to nine tenths of what is
    free: a batch too large is then a row, and not the kernel ending some process. `patience` is how long, in seconds,
    one row may take before it counts as hung.
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
    patience: float = 600.0

    def __post_init__(self) -> None:
        """Raise `ConfigError` naming the first impossible number."""
        for name in ("threads", "least", "most", "repeats", "mix", "memory_mb"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} is {value}; allowed: 1 or more")
        if self.least > self.most:
            raise ConfigError(f"least is {self.least} and most {self.most}; allowed: least up to most")

    def bodies(self) -> list[bytes]:
        """Return the mix: `mix` pictures, evenly from all of them, or fewer ones again and again."""
        bodies = self.pictures.bodies
        count = max(len(bodies), self.mix)
        return [bodies[i * count // self.mix % len(bodies)] for i in range(self.mix)]


@dataclass(frozen=True)
class Timing:
    """One stage at one batch size: median and quartiles of a batch's milliseconds, and the median for one image."""

    median_ms: float
    low_ms: float
    high_ms: float
    ms_per_image: float

    @classmethod
    def of(cls, milliseconds: Sequence[float], batch: int) -> Timing:
        """Sum up a stage's samples, each the milliseconds of one batch."""
        low, median, high = np.quantile(milliseconds, (0.25, 0.5, 0.75)).tolist()
        return cls(round(median, 4), round(low, 4), round(high, 4), round(median / batch, 5))


@dataclass(frozen=True)
class Row:
    """One batch size: the stages' timings by name, or why there are none."""

    batch: int
    stages: Mapping[str, Timing]
    repeats: int = 0
    error: str | None = None

    @classmethod
    def of(cls, batch: int, samples: Mapping[str, Sequence[float]]) -> Row:
        """Sum up each stage's samples."""
        return cls(batch, {stage: Timing.of(samples[stage], batch) for stage in STAGES}, len(samples[STAGES[0]]))

    def per_image(self, stage: str) -> float:
        """Return a stage's milliseconds for one image."""
        return self.stages[stage].ms_per_image

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; the stages of a row with an error are null."""
        timings = {stage: vars(self.stages[stage]) if stage in self.stages else None for stage in STAGES}
        return {"batch": self.batch, "error": self.error, "repeats": self.repeats, **timings}

    def __str__(self) -> str:
        """Return one line of progress."""
        costs = ", ".join(f"{TITLES[stage]} {self.per_image(stage):.3g}" for stage in STAGES if not self.error)
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


def line_of(rows: Sequence[Row], stage: str) -> Fit | None:
    """Return a stage's batch time as a line; None for fewer than two batch sizes."""
    return fit([(row.batch, row.stages[stage].median_ms) for row in rows if row.error is None])


class TimedSandbox(Sandbox):
    """The sandbox of a plan's archive; `about` is what it says of the model."""

    def __init__(self, plan: Plan) -> None:
        """Raise `ArchiveError` for an archive that is not there, or not as it was built."""
        path = plan.archive.resolve()
        # Only a path that ends so is taken for one, not for a name in a store.
        if path.suffix != ".mar":
            raise ArchiveError(f"{plan.archive} is no .mar file; build one with `beeline archive build`")
        store.find_archives(path.parent, (str(path),))
        # A row of one picture has as many threads as the others.
        threads = dict.fromkeys(("BEELINE_THREADS", "BEELINE_LONE_THREADS"), str(plan.threads))
        environment = {"BEELINE_DEVICE": plan.device, **threads}
        super().__init__(path, load_seconds=plan.patience, batch_seconds=plan.patience, environment=environment)
        self.plan = plan

    def __enter__(self) -> TimedSandbox:
        super().__enter__()
        limit = self.plan.memory_mb
        memory = int(machine.free_memory() * _MOST_MEMORY) if limit is None else limit << 20
        try:
            self.about = self.take(self.plan.bodies(), memory)
            if self.about["refused"]:
                raise ArchiveError(
                    f"a picture of the mix is refused ({self.about['refused']}); name pictures that the model takes"
                )
        except BaseException:
            self.close()
            raise
        return self

    def measure(self, batch: int) -> Row:
        """Measure one batch size; see `Sandbox.time_stages`. A batch that does not fit into memory is a row too."""
        try:
            return Row.of(batch, self.time_stages(batch, self.plan.repeats, self.plan.seconds))
        except OutOfMemory:
            return Row(batch, {}, error=OUT_OF_MEMORY)


def grow(measure: Callable[[int], Row], least: int, most: int, watch: Callable[[Row], None]) -> str:
    """Measure batch sizes 1, 2, 4 ... up to `most`, no plateau before `least`, and return why they end."""
    rows: list[Row] = []
    while (batch := 1 << len(rows)) <= most:
        rows.append(measure(batch))
        watch(rows[-1])
        if rows[-1].error is not None:
            return OUT_OF_MEMORY
        if batch >= least and is_flat(rows):
            return "plateau"
    return f"largest batch asked for ({most})"


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

    def keep(row: Row) -> None:
        rows.append(row)
        watch(row)

    with TimedSandbox(plan) as worker:
        try:
            ended = grow(worker.measure, plan.least, plan.most, keep)
        except Interrupted as error:
            if not rows:
                raise
            interruption, ended = error, f"interrupted ({error})"
    lines = {stage: line_of(rows, stage) for stage in ("forward", "handler")}
    device, reason = worker.choice["device"]
    why = reason if "no CUDA" in reason else f"{device} was {reason}"
    result = {
        **{name: worker.about[name] for name in ("model", "version", "classes")},
        "device": device,
        "precision": worker.choice["precision"][0],
        "threads": int(worker.choice["threads"][0]),
        "reasons": {name: reason for name, (_, reason) in worker.choice.items()},
        "rows": [row.to_dict() for row in rows],
        "knee": knee(rows),
        "ended": ended,
        "mix": plan.mix,
        "fit": {stage: line.to_dict() if line else None for stage, line in lines.items()},
        "reference": [dict(reference) for reference in REFERENCES],
        "differences": differences(rows),
        "not_run": [{"what": "CUDA", "why": why}] if device == "cpu" else [],
    }
    return result, interruption


_UNIT = "ms per image"
# What users reported; from batch `worse_at` on an image got slower again.
REFERENCES: tuple[Mapping[str, Any], ...] = (
    {"what": "ResNet-18, reported by users", "points": [[8, 17.5], [32, 13.75]], "worse_at": 64, "unit": _UNIT},
    {"what": "ResNet-101, reported by users", "points": [[1, 2.75], [256, 1.02]], "worse_at": None, "unit": _UNIT},
)


def differences(rows: Sequence[Row], references: Sequence[Mapping[str, Any]] = REFERENCES) -> list[str]:
    """Return a sentence a reference on its shape and ours, by their lines, and one on what batching cannot spread."""
    good = [row for row in rows if row.error is None]
    line = line_of(rows, "forward")
    if line is None:
        return ["Ours has fewer than two batch sizes, so there is no shape to compare."]
    best = min(good, key=lambda row: row.per_image("handler"))
    rest = max(0.0, best.per_image("handler") - best.per_image("forward"))
    return [_difference(good, line, reference) for reference in references] + [
        f"Of our {best.per_image('handler'):.3g} ms per image at batch {best.batch}, {rest:.3g} ms "
        f"({rest / best.per_image('handler'):.0%}) are outside the forward pass, where a larger batch saves nothing; "
        "the references do not say what theirs include."
    ]


def _difference(good: Sequence[Row], line: Fit, reference: Mapping[str, Any]) -> str:
    (small, before), (large, after) = reference["points"][0], reference["points"][-1]
    theirs = fit([(batch, batch * each) for batch, each in reference["points"]])
    assert theirs is not None
    worse = f" and is worse at {reference['worse_at']}" if reference["worse_at"] else ""
    shape = f"{reference['what']}: an image gets {_times(before / after)} from batch {small} to {large}{worse}"
    first, last = (min(good, key=lambda row: abs(row.batch - size)) for size in (small, large))
    if first.batch == last.batch:
        return f"{shape}; ours has only batch {first.batch} in that range, so the shapes cannot be compared."
    gain = first.per_image("forward") / last.per_image("forward")
    alone = (line.a_ms + line.b_ms / first.batch) / (line.a_ms + line.b_ms / last.batch)
    text = f"{shape}; our forward pass gets {_times(gain)} from {first.batch} to {last.batch}. "
    text += f"A batch of theirs costs {theirs}, one of ours {line}"
    if abs(gain * after / before - 1) <= NEAR:
        return f"{text}: the shapes are alike."
    text += f"; only what is fixed is spread over more images, which makes ours {_times(alone)}."
    return f"{text} Our points lie up to {line.error:.0%} off their line."


def _times(gain: float) -> str:
    if abs(gain - 1) < 0.01:
        return "no faster"
    return f"{gain:.2f} times faster" if gain > 1 else f"{1 / gain:.2f} times slower"


def text(result: Mapping[str, Any]) -> str:
    """Return a sweep's result as a table with the knee marked, then what it says."""
    rows = [["batch", "threads", "precision", *titles(result).values(), ""]]
    for row in result["rows"]:
        costs = [row["error"], "", "", ""] if row["error"] else [_cell(**row[stage]) for stage in STAGES]
        mark = "<- knee" if row["batch"] == result["knee"] else ""
        rows.append([str(row["batch"]), str(result["threads"]), str(result["precision"]), *costs, mark])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    title = f"{result['model']} {result['version']}, {result['classes']} classes, on {result['device']}"
    lines = ["  ".join(map(str.rjust, row, widths)).rstrip() for row in rows]
    lines += ["", *(f"{about}: {sentence}" for about, sentence in notes(result))]
    return "\n".join((title, "each: ms a batch (quartiles), ms per image", *lines))


def notes(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what a sweep says, each with what it is about: knee, end, references, differences, what was not run."""
    lines = (
        [("knee", f"batch {result['knee']}, the smallest within 5 % of the cheapest image")] if result["knee"] else []
    )
    lines.append(("ended by", str(result["ended"])))
    for reference in result["reference"]:
        points = ", ".join(f"{each:g} at batch {batch}" for batch, each in reference["points"])
        worse = f", worse at {reference['worse_at']}" if reference.get("worse_at") else ""
        lines.append((reference["what"], f"{points}{worse} ({reference['unit']})"))
    lines += [("shape", sentence) for sentence in result["differences"]]
    return lines + [(one["what"], f"not run, {one['why']}") for one in result["not_run"]]


def titles(result: Mapping[str, Any]) -> dict[str, str]:
    """Return each stage's column head; only a CUDA device is copied to."""
    return {**TITLES, "copied": "+ copy to device" if str(result["device"]).startswith("cuda") else TITLES["copied"]}


def _cell(median_ms: float, low_ms: float, high_ms: float, ms_per_image: float) -> str:
    return f"{number(median_ms)} ({number(low_ms)}-{number(high_ms)})  {number(ms_per_image)}"
