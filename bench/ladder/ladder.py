"""A measured ladder: its rows, its knee, and the references beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.ladder.climb import climb, knee
from bench.ladder.fit import Fit, fit
from bench.ladder.plan import Plan
from bench.ladder.process import Worker
from bench.ladder.reference import REFERENCES, differences
from bench.ladder.row import Row
from host.signals import Interrupted


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
        about["model"], about["version"], about["classes"], about["choice"], tuple(rows), ended, plan.mix, asked
    )
