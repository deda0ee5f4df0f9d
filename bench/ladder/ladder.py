"""A measured ladder: its rows, its knee, and the references beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from archive import store
from archive.sandbox import OutOfMemory, Sandbox
from beeline.errors import ArchiveError
from bench.ladder.climb import climb, knee
from bench.ladder.fit import Fit, fit
from bench.ladder.plan import Plan
from bench.ladder.reference import REFERENCES, differences
from bench.ladder.row import OUT_OF_MEMORY, Row
from host import machine
from host.signals import Interrupted

# Of the memory that is free.
_MOST_MEMORY = 0.9


class Worker(Sandbox):
    """The sandbox of a plan's archive; `about` is what it says of the model."""

    def __init__(self, plan: Plan) -> None:
        """Nothing is started yet.

        Raises:
            ArchiveError: for an archive that is not there, or not as it was built.
        """
        path = plan.archive.resolve()
        # Only a path that ends so is taken for one, not for a name in a store.
        if path.suffix != ".mar":
            raise ArchiveError(f"{plan.archive} is no .mar file; build one with `beeline archive build`")
        store.find(path.parent, (str(path),))
        # A row of one picture has as many threads as the others.
        threads = dict.fromkeys(("BEELINE_THREADS", "BEELINE_LONE_THREADS"), str(plan.threads))
        environment = {"BEELINE_DEVICE": plan.device, **threads}
        super().__init__(path, load_seconds=plan.patience, batch_seconds=plan.patience, environment=environment)
        self.plan = plan

    def __enter__(self) -> Worker:
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
        """Measure one batch size; a batch that does not fit into memory is a row too.

        Raises:
            ArchiveError: when the handler fails otherwise. Undetermined: when it ends or hangs.
        """
        try:
            return Row.of(batch, self.time_stages(batch, self.plan.repeats, self.plan.seconds))
        except OutOfMemory:
            return Row(batch, {}, error=OUT_OF_MEMORY)


@dataclass(frozen=True)
class Ladder:
    """The rows, why they end, and what ran: `choice` holds device, precision and threads with their reasons.

    `asked` is the signal that interrupted it; the rows until then are kept.
    """

    model: str
    version: str
    classes: int
    choice: dict[str, list[str]]
    rows: tuple[Row, ...]
    ended: str
    mix: int
    asked: Interrupted | None = None

    def fit(self, stage: str = "handler") -> Fit | None:
        """Return a stage's batch time as a line; None for fewer than two batch sizes."""
        return fit([(row.batch, row.stages[stage].median_ms) for row in self.rows if row.error is None])

    def to_dict(self) -> dict[str, Any]:
        """Return the `table` record's result as JSON values."""
        lines = {stage: self.fit(stage) for stage in ("forward", "handler")}
        return {
            "model": self.model,
            "version": self.version,
            "classes": self.classes,
            "device": self.choice["device"][0],
            "precision": self.choice["precision"][0],
            "threads": int(self.choice["threads"][0]),
            "reasons": {name: reason for name, (_, reason) in self.choice.items()},
            "rows": [row.to_dict() for row in self.rows],
            "knee": knee(self.rows),
            "ended": self.ended,
            "mix": self.mix,
            "fit": {stage: line.to_dict() if line else None for stage, line in lines.items()},
            "reference": [reference.to_dict() for reference in REFERENCES],
            "differences": differences(self.rows),
            "not_run": self._not_run(),
        }

    def _not_run(self) -> list[dict[str, str]]:
        """Return what this ladder says nothing about, and why."""
        if self.choice["device"][0] != "cpu":
            return []
        device, reason = self.choice["device"]
        why = reason if "no CUDA" in reason else f"{device} was {reason}"
        return [{"what": "CUDA", "why": why}]


def measure(plan: Plan, watch: Callable[[Row], None] | None = None) -> Ladder:
    """Climb the plan's ladder in a worker process, which has ended when this returns or raises.

    Args:
        plan: what to measure.
        watch: told each row as it is there.

    Raises:
        ArchiveError: for an archive that does not load or fails. Undetermined: for a worker that ended or hangs.
        Interrupted: when it was interrupted before there was a row.
    """
    rows: list[Row] = []
    asked = None

    def keep(row: Row) -> None:
        rows.append(row)
        if watch is not None:
            watch(row)

    with Worker(plan) as worker:
        about = worker.about
        try:
            _, ended = climb(worker.measure, plan.least, plan.most, keep)
        except Interrupted as error:
            if not rows:
                raise
            asked, ended = error, f"interrupted ({error})"
    return Ladder(
        about["model"], about["version"], about["classes"], worker.choice, tuple(rows), ended, plan.mix, asked
    )
