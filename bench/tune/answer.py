"""The answer of a tuning: which configuration, how good, in one sentence, a table, and reasons for the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.tune.candidates import EXPECTED, Field, Pruned
from bench.tune.forecast import Forecaster
from bench.tune.goal import Goal
from bench.tune.settings import Settings
from bench.tune.standing import SAME, Standing, choose, standings
from bench.tune.turns import Turn

_TITLES = ("requests/s", "p95 ms", "failed", "batch seen", "turns", "goal", "configuration")
# Reasons on a terminal; the record has them all.
_MOST_REASONS = 16


@dataclass(frozen=True)
class Answer:
    """What a tuning found, however far it came.

    Attributes:
        model: its name.
        goal: what was wanted.
        configured: what is configured now.
        ranked: the measured configurations, best first.
        best: the chosen one; None where nothing was measured.
        expected: the best forecast, which is the answer where nothing was measured.
        forecaster: what was expected, after all that was measured.
        pruned: what was not measured, and why.
    """

    model: str
    goal: Goal
    configured: Settings
    ranked: tuple[Standing, ...]
    best: Standing | None
    expected: Settings
    forecaster: Forecaster
    pruned: tuple[Pruned, ...]

    @classmethod
    def of(
        cls, model: str, configured: Settings, forecaster: Forecaster, considered: Field, turns: Sequence[Turn]
    ) -> Answer:
        """Return the answer that the turns so far give."""
        goal = forecaster.goal
        ranked = standings(turns, goal)
        learned = forecaster.learned(ranked)
        measured = {standing.settings for standing in ranked}
        rest = [each for each in considered.promising if each not in measured]
        pruned = (*considered.pruned, *(_unmeasured(each, learned) for each in rest))
        best = choose(ranked, goal, configured)
        return cls(model, goal, configured, tuple(ranked), best, considered.promising[0], learned, pruned)

    @property
    def settings(self) -> Settings:
        """The chosen configuration."""
        return self.expected if self.best is None else self.best.settings

    @property
    def holds(self) -> bool:
        """Whether the chosen configuration was measured to reach the goal."""
        return self.best is not None and self.best.holds

    @property
    def now(self) -> Standing | None:
        """What is configured now, where it was measured."""
        return next((each for each in self.ranked if each.settings == self.configured), None)

    @property
    def sentence(self) -> str:
        """What, how much, under which goal, and against what is configured now."""
        if self.best is None:
            forecast = self.forecaster.of(self.expected)
            return (
                f"{self.model}: no turn was measured; from the time of a batch alone, {self.expected} is expected to "
                f"answer {forecast.per_second:.0f} requests a second ({self.goal.text})."
            )
        best = f"{self.best.settings}: {self.best.per_second:.1f} requests a second, {_p95(self.best)}"
        if self.best.failed:
            best += f", {self.best.failed} requests failed or took over {self.goal.deadline:g} s"
        if self.best.holds:
            return f"{self.model}: {best}, which holds {self.goal.text}; {self._against()}."
        return f"{self.model}: nothing measured holds {self.goal.text}; the nearest is {best}; {self._instead()}."

    def to_dict(self) -> dict[str, Any]:
        """Return the record's result, but for how the measuring went."""
        fits = {threads: curve.line.to_dict() for threads, curve in self.forecaster.curves.items()}
        return {
            "model": self.model,
            "goal": self.goal.to_dict(),
            "clients": None if self.goal.open else self.goal.clients,
            "cores": self.forecaster.cores,
            "fit": fits[self.settings.threads] | {"threads": self.settings.threads},
            "fits": [{"threads": threads, **fit} for threads, fit in sorted(fits.items())],
            "configured": self.configured.to_dict(),
            "tried": [standing.to_dict() for standing in self.ranked],
            "pruned": [each.to_dict() for each in self.pruned],
            "best": self._row(),
            "holds": self.holds,
            "sentence": self.sentence,
        }

    def lines(self) -> list[str]:
        """Return the table of what was tried, and why the rest was not."""
        rows = [_TITLES, *(self._cells(standing) for standing in self.ranked)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_TITLES))]
        out = []
        if self.ranked:
            out += ["  ".join([*map(str.rjust, row[:-1], widths), row[-1]]) for row in rows]
        if self.pruned:
            grouped = list(_grouped(self.pruned))
            out += ["not measured:", *grouped[:_MOST_REASONS]]
            if len(grouped) > _MOST_REASONS:
                out.append(f"  ... and {len(grouped) - _MOST_REASONS} reasons more, which the record has")
        return out

    def _cells(self, standing: Standing) -> tuple[str, ...]:
        marks = [
            word
            for word, holds in (
                ("chosen", standing is self.best),
                ("configured now", standing.settings == self.configured),
            )
            if holds
        ]
        return (
            f"{standing.per_second:.1f}",
            "-" if standing.p95_ms is None else f"{standing.p95_ms:.0f}",
            str(standing.failed),
            "-" if standing.batch is None else f"{standing.batch:.1f}",
            str(standing.turns),
            "holds" if standing.holds else "no",
            f"{standing.settings}{' <- ' + ', '.join(marks) if marks else ''}",
        )

    def _row(self) -> dict[str, Any]:
        if self.best is not None:
            return self.best.to_dict()
        forecast = self.forecaster.of(self.expected)
        p95 = None if math.isinf(forecast.p95_ms) else round(forecast.p95_ms, 1)
        found = {"per_second": round(forecast.per_second, 2), "p95_ms": p95, "failed": 0, "holds": False}
        return {**self.expected.to_dict(), **found, "expected": True}

    def _against(self) -> str:
        now = self.now
        assert self.best is not None
        if now is self.best:
            return "it is what is configured now"
        if now is None:
            return f"what is configured now ({self.configured}) was not measured"
        told = f"what is configured now ({self.configured}: {now.per_second:.1f} a second, {_p95(now)})"
        if not now.holds:
            return f"{told} does not hold it"
        if self.goal.open:
            return f"{told} has {math.exp(now.delay - self.best.delay):.2f} times its p95"
        times = math.exp(self.best.speed - now.speed)
        return f"{times:.2f} times {told}" if abs(times - 1) > SAME else f"no faster than {told}, but quicker to answer"

    def _instead(self) -> str:
        assert self.best is not None
        if self.goal.rate is not None:
            return "lower the rate, or serve it from more cores"
        assert self.goal.p95_ms is not None
        if self.best.failed and (self.best.p95_ms or 0) <= self.goal.p95_ms:
            return "look into why requests fail with `beeline bench load`"
        if not self.best.p95_ms:
            return "no request was answered"
        clients = max(1, int(self.goal.clients * self.goal.p95_ms / self.best.p95_ms))
        return f"about {clients} clients at a time would be within the budget, or serve it from more cores"


def _unmeasured(settings: Settings, forecaster: Forecaster) -> Pruned:
    found = forecaster.of(settings)
    p95 = "ever more waiting" if math.isinf(found.p95_ms) else f"p95 {found.p95_ms:.0f} ms"
    return Pruned(
        str(settings), f"{EXPECTED} {found.per_second:.0f} answers a second, {p95}, and nothing near it was in the lead"
    )


def _grouped(pruned: Sequence[Pruned]) -> Iterable[str]:
    """Yield a line a reason that is not a forecast of its own; those with a forecast, a line for all of them."""
    forecasts = [each for each in pruned if each.why.startswith(EXPECTED)]
    for each in pruned:
        if not each.why.startswith(EXPECTED):
            yield f"  {each.what}: {each.why}"
    for each in forecasts[:5]:
        yield f"  {each.what}: {each.why}"
    if len(forecasts) > 5:
        yield f"  {len(forecasts) - 5} more whose forecast was no better"


def _p95(standing: Standing) -> str:
    return "no answer" if standing.p95_ms is None else f"p95 {standing.p95_ms:.0f} ms"
