"""How configurations stand after the turns so far, the machine's drift between rounds taken out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.tune.goal import Goal
from bench.tune.settings import Settings
from bench.tune.turns import Turn

# Noise of a turn of so many seconds and the machine's drift, as parts of one; turns over which drift is forgotten.
_SECONDS = 5.0
_NOISE, _DRIFT, _MEMORY = 0.05, 0.12, 4.0
_PRIOR_TURNS = 4
# Levels that differ by less than this are the same: lower latency, or what is configured now, decides.
SAME = 0.01
_NO_ANSWER_MS = 600_000.0


@dataclass(frozen=True)
class Standing:
    """One configuration after its turns.

    Attributes:
        settings: the configuration.
        per_second: median of its turns.
        p95_ms: median of its turns; None where no turn had an answer.
        failed: requests in all its turns that were not answered 200.
        turns: how many.
        seconds: measured in all.
        batch: median of the mean batch sizes seen.
        holds: whether it reaches the goal.
        speed: logarithm of the throughput, comparable between configurations of different rounds.
        delay: the same of the 95th percentile.
        error: standard error of `speed`, as a part of one.
    """

    settings: Settings
    per_second: float
    p95_ms: float | None
    failed: int
    turns: int
    seconds: float
    batch: float | None
    holds: bool
    speed: float
    delay: float
    error: float

    def to_dict(self) -> dict[str, Any]:
        """Return a row of the record."""
        return {
            **self.settings.to_dict(),
            "per_second": round(self.per_second, 2),
            "p95_ms": None if self.p95_ms is None else round(self.p95_ms, 1),
            "failed": self.failed,
            "holds": self.holds,
            "turns": self.turns,
            "seconds": round(self.seconds, 1),
            "batch": self.batch,
        }


def standings(turns: Sequence[Turn], goal: Goal) -> list[Standing]:
    """Return every measured configuration, the best for the goal first."""
    if not turns:
        return []
    order = sorted({turn.settings for turn in turns})
    speeds, errors = _levels(turns, order, [math.log(max(turn.per_second, 1e-3)) for turn in turns])
    delays, _ = _levels(turns, order, [math.log(turn.p95_ms or _NO_ANSWER_MS) for turn in turns])
    found = []
    for settings, speed, error, delay in zip(order, speeds, errors, delays, strict=True):
        own = [turn for turn in turns if turn.settings == settings]
        answered = [turn.p95_ms for turn in own if turn.p95_ms is not None]
        batches = [turn.batch for turn in own if turn.batch is not None]
        per_second = statistics.median(turn.per_second for turn in own)
        p95_ms = statistics.median(answered) if answered else None
        failed = sum(turn.failed for turn in own)
        growing = 2 * sum(turn.growing for turn in own) > len(own)
        found.append(
            Standing(
                settings,
                per_second,
                p95_ms,
                failed,
                len(own),
                sum(turn.seconds for turn in own),
                statistics.median(batches) if batches else None,
                goal.holds(per_second, p95_ms, failed, growing),
                speed,
                delay,
                error,
            )
        )
    return sorted(found, key=lambda standing: _key(standing, goal))


def choose(ranked: Sequence[Standing], goal: Goal, configured: Settings | None = None) -> Standing | None:
    """Return the best of `standings`; of several that are the same, `configured` or the one of lowest latency."""
    if not ranked:
        return None
    first = ranked[0]
    if not first.holds:
        return first
    same = [each for each in ranked if each.holds and loss(each, first, goal) <= SAME]
    kept = [each for each in same if each.settings == configured]
    return kept[0] if kept else min(same, key=lambda each: (each.delay, each.settings.workers))


def loss(standing: Standing, best: Standing, goal: Goal) -> float:
    """Return by which part a configuration is worse than the best one, in what the goal asks for."""
    if goal.open:
        return 1 - math.exp(best.delay - standing.delay)
    return 1 - math.exp(standing.speed - best.speed)


def _key(standing: Standing, goal: Goal) -> tuple[float, ...]:
    if standing.holds:
        return (0, 0, standing.delay if goal.open else -standing.speed)
    # Nothing holds: what comes nearest.
    return (1, 0, -standing.speed) if goal.open else (1, float(standing.failed > 0), standing.delay)


def _levels(
    turns: Sequence[Turn], order: Sequence[Settings], values: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Return each configuration's level and its standard error, from value = level + drift + noise.

    The drift of two turns is alike when they are near each other in time, so a turn is compared with its
    neighbours above all: generalised least squares with that covariance.
    """
    places = np.arange(len(turns))
    drift = _DRIFT**2 * np.exp(-np.abs(places[:, None] - places[None, :]) / _MEMORY)
    noise = _NOISE**2 * np.diag([_SECONDS / max(turn.seconds, 0.1) for turn in turns])
    design = np.array([[float(turn.settings == settings) for settings in order] for turn in turns])
    weighted = np.linalg.solve(drift + noise, np.column_stack([design, values]))
    inverse = np.linalg.inv(design.T @ weighted[:, :-1])
    levels = inverse @ design.T @ weighted[:, -1]
    left = np.array(values) - design @ levels
    freedom = len(turns) - len(order)
    misfit = float(left @ np.linalg.solve(drift + noise, left))
    scale = (misfit + _PRIOR_TURNS) / (freedom + _PRIOR_TURNS)
    # Of a difference between two, in which the drift of the whole time is no matter.
    errors = np.sqrt(scale * np.maximum(np.diag(inverse) - inverse.min(), _NOISE**2 / 50))
    return levels.tolist(), errors.tolist()
