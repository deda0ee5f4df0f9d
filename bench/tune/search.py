"""The search on the real server: one turn for what is promising, then successive halving of the finalists."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.record import Journal
from bench.tune.grid import Forecast, Goal, Settings

if TYPE_CHECKING:
    from bench.tune.server import Servers

# Seconds of a turn of new configurations, and of the finalists; less than the last cannot be measured.
_TURN, _LONG, _SHORTEST = 4.0, 6.0, 1.0
# New configurations at a time; those that may be better than the best by their forecast and this part of one.
_WAVE, _HOPE = 6, 0.2
# The finalists, none worse than the best by more than this part; their share of the time, and their rounds.
_FINALISTS, _MARGIN, _DECIDING, _ROUNDS = 4, 0.15, 0.35, 6
# A turn lasts this many times as long as a client waits for one answer, or its percentile says nothing; at a rate, it
# has so many arrivals. Slow models get longer turns, up to this factor.
_CYCLES, _ARRIVALS, _LONGER = 4.0, 300, 6.0
# Noise of a turn of so many seconds and the machine's drift, as parts of one; turns over which drift is forgotten.
_SECONDS, _NOISE, _DRIFT, _MEMORY = 5.0, 0.05, 0.12, 4.0
# Figures that differ by less than this part are the same: what is configured now, or lower latency, decides.
SAME = 0.01
_NO_ANSWER_MS = 600_000.0
# Longer starts are given up by TorchServe's own limit of two minutes.
_BOOT_SECONDS = 60.0


@dataclass(frozen=True)
class Turn:
    """One measured load on one configuration.

    `p95_ms` is None where nothing was answered, `failed` counts requests that were not answered 200, `growing` says
    whether ever more arrivals waited, and `batch` is the mean of the batch sizes seen, None where no answer told.
    """

    settings: Settings
    seconds: float
    per_second: float
    p95_ms: float | None
    failed: int
    growing: bool = False
    batch: float | None = None

    @classmethod
    def of(cls, settings: Settings, summary: Mapping[str, Any]) -> Turn:
        """Return the turn that a load's summary tells of."""
        sizes = {int(size): count for size, count in summary["batch_sizes"].items()}
        # Each request of a batch of n tells n: the mean over batches, not over requests.
        batches = sum(count / size for size, count in sizes.items())
        mean = round(sum(sizes.values()) / batches, 2) if batches else None
        growing = bool(summary["backlog"] and summary["backlog"]["growing"])
        seconds, per_second, p95_ms = summary["seconds"], summary["good_per_second"], summary["p95_ms"]
        return cls(settings, seconds, per_second, p95_ms, summary["failed"], growing, mean)

    def __str__(self) -> str:
        notes = [f"{self.failed} failed"] * bool(self.failed) + ["ever more wait"] * self.growing
        figures = [f"{self.per_second:.1f}/s", p95_text(self.p95_ms), *notes]
        return f"{self.settings}: {', '.join(figures)} ({self.seconds:.1f} s)"


def turns_of(journal: Journal) -> list[Turn]:
    """Return what a journal holds of turns."""
    return [Turn(**{**values, "settings": Settings.of(values["settings"])}) for values in journal.of("turn")]


def p95_text(p95_ms: float | None) -> str:
    """Return a 95th percentile for people."""
    return "no answer" if p95_ms is None else f"p95 {p95_ms:.0f} ms"


@dataclass(frozen=True)
class Score:
    """One configuration after its turns: medians and sums of them, and whether that holds the goal.

    `speed` and `latency` are the logarithms of throughput and 95th percentile without the machine's drift: comparable
    between configurations that were measured at other times.
    """

    settings: Settings
    per_second: float
    p95_ms: float | None
    failed: int
    holds: bool
    turns: int
    seconds: float
    batch: float | None
    speed: float
    latency: float

    def to_dict(self) -> dict[str, Any]:
        """Return a row of the record."""
        values = asdict(self)
        rounded = {key: round(value, 2) if isinstance(value, float) else value for key, value in values.items()}
        return {**values["settings"], **{key: rounded[key] for key in list(rounded)[1:-2]}}


def rank(turns: Sequence[Turn], goal: Goal) -> list[Score]:
    """Return every measured configuration, the best for the goal first; where nothing holds, the nearest."""
    order = sorted({turn.settings for turn in turns})
    figures = [(max(turn.per_second, 1e-3), turn.p95_ms or _NO_ANSWER_MS) for turn in turns]
    scores = []
    for settings, (speed, latency) in zip(order, _levels(turns, order, np.log(figures or [(1, 1)])), strict=True):
        own = [turn for turn in turns if turn.settings == settings]
        per_second, p95_ms = statistics.median(turn.per_second for turn in own), _median(turn.p95_ms for turn in own)
        failed, growing = sum(turn.failed for turn in own), 2 * sum(turn.growing for turn in own) > len(own)
        holds, seconds = goal.holds(per_second, p95_ms, failed, growing), sum(turn.seconds for turn in own)
        batch = _median(turn.batch for turn in own)
        scores.append(Score(settings, per_second, p95_ms, failed, holds, len(own), seconds, batch, speed, latency))

    def key(score: Score) -> tuple[float, ...]:
        if goal.rate:
            return (0, score.latency) if score.holds else (1, -score.speed)
        return (0, -score.speed) if score.holds else (1, float(score.failed > 0), score.latency)

    return sorted(scores, key=key)


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _levels(turns: Sequence[Turn], order: Sequence[Settings], values: Any) -> list[tuple[float, float]]:
    """Return each configuration's levels, from value = level + drift + noise.

    The drift of two turns is alike when they are near each other in time, so a turn is compared with its neighbours
    above all: generalised least squares with that covariance.
    """
    if not turns:
        return []
    places = np.arange(len(turns))
    drift = _DRIFT**2 * np.exp(-np.abs(places[:, None] - places[None, :]) / _MEMORY)
    noise = _NOISE**2 * np.diag([_SECONDS / max(turn.seconds, 0.1) for turn in turns])
    design = np.array([[float(turn.settings == settings) for settings in order] for turn in turns])
    weights = np.linalg.solve(drift + noise, design).T
    levels = np.linalg.solve(weights @ design, weights @ values)
    return [(float(speed), float(latency)) for speed, latency in levels]


def loss(score: Score, best: Score, goal: Goal) -> float:
    """Return by which part a configuration is worse than the best one, in what the goal asks for."""
    return 1 - math.exp(best.latency - score.latency if goal.rate else score.speed - best.speed)


def choose(ranked: Sequence[Score], goal: Goal, configured: Settings | None = None) -> Score | None:
    """Return the best of `rank`; of several that are the same, `configured` or the one of lowest latency."""
    same = [each for each in ranked if each.holds and loss(each, ranked[0], goal) <= SAME]
    same.sort(key=lambda each: (each.settings != configured, each.latency, each.settings.workers))
    return next(iter([*same, *ranked]), None)


@dataclass
class Search:
    """Measures the `promising` configurations, best forecast first, and in any case what is `configured` now.

    `journal` has what was measured before an interruption; `deadline` is of `clock`, in seconds.
    """

    forecast: Forecast
    promising: Sequence[Settings]
    configured: Settings
    servers: Servers
    journal: Journal
    clock: Callable[[], float]
    deadline: float
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self._open: set[Settings] = set()
        self._learn()

    def run(self) -> None:
        """Measure until it is decided or time is up; what was measured is in the journal whenever it ends."""
        until = self.clock() + (1 - _DECIDING) * self._left()
        while wave := self._wave(until):
            # The best so far is measured again in each wave, to tell its figures from the machine's drift.
            self._measure([*wave, *(each.settings for each in self.ranked[:1])], _TURN)
        margins = [loss(each, self.ranked[0], self.forecast.goal) for each in self.ranked[:_FINALISTS]]
        # Two at least: turns of one alone decide nothing.
        finalists = [each.settings for i, each in enumerate(self.ranked[:_FINALISTS]) if i < 2 or margins[i] <= _MARGIN]
        for number in range(_ROUNDS):
            if not finalists or self._left() < sum(sum(self._lengths(each, _LONG)) for each in finalists[:2]):
                return
            # What is configured now is what they must beat.
            self._measure([*finalists, *([] if number else [self.configured])], _LONG)
            better = [each.settings for each in self.ranked if each.settings in finalists]
            finalists = better[: max(2, len(better) // 2)]

    def _wave(self, until: float) -> list[Settings]:
        """Return what to measure for the first time, as far as time and memory allow; the first of all in any case."""
        measured = {each.settings for each in self.ranked}
        left = [each for each in self.promising if each not in measured]
        wanted = self._hopeful(left) if measured else [self.promising[0], self.configured]
        room = self.servers.room() + sum(each.workers for each in self._open)
        kept: list[Settings] = []
        for settings in dict.fromkeys(wanted):
            more = [*kept, settings]
            opening = self.servers.opening_seconds(more)
            seconds = opening + sum(sum(self._lengths(each, _TURN)) for each in more)
            fits = sum(each.workers for each in more) <= room and opening <= _BOOT_SECONDS
            if (fits and self.clock() + seconds <= until) or not (measured or kept):
                kept = more
        return kept[:_WAVE]

    def _hopeful(self, left: Sequence[Settings]) -> list[Settings]:
        """Return what may be better than the best so far, and its other delays, whose effect is not forecast."""
        best, goal = self.ranked[0], self.forecast.goal
        tried = {(each.settings.layout, each.settings.batch_size) for each in self.ranked}
        layouts = {layout for layout, _ in tried}
        first: dict[tuple[tuple[int, int], int], Settings] = {}
        for settings in sorted(left, key=lambda each: self.forecast.of(each)[1]):
            per_second, p95_ms = self.forecast.of(settings)
            gain = best.latency - math.log(p95_ms) if goal.rate else math.log(per_second) - best.speed
            layout, size = settings.layout, settings.batch_size
            if gain > -_HOPE and (layout, size) not in tried:
                # Of a layout that nobody tried, one configuration says enough; and of a batch size, one delay.
                first.setdefault((layout, size if layout in layouts else 0), settings)
        order, now = list(first.values()), best.settings
        delays = [each for each in left if replace(each, max_batch_delay=now.max_batch_delay) == now]
        return [*order[:2], *delays, *order]

    def _measure(self, wanted: Sequence[Settings], seconds: float) -> None:
        """Give each one turn, in an order that no round repeats."""
        order = sorted(set(wanted))
        random.Random(len(self.journal.rows)).shuffle(order)
        closed = [each for each in order if each not in self._open]
        if self._open and sum(each.workers for each in closed) > self.servers.room():
            self.servers.stop()
            self._open, closed = set(), order
        lengths = {settings: self._lengths(settings, seconds) for settings in order}
        if closed:
            self.servers.open(closed)
            self._open.update(closed)
        for settings in order:
            length, warm_up, last = lengths[settings]
            length = min(length, self._left() - warm_up - last)
            if length < _SHORTEST:
                break
            turn = Turn.of(settings, self.servers.run(settings, length, warm_up))
            self.journal.add("turn", asdict(turn))
            self.say(f"  {turn}")
        self._learn()

    def _lengths(self, settings: Settings, seconds: float) -> tuple[float, float, float]:
        """Return how long to measure a configuration, to warm it up before, to await the last answers after it."""
        if self.forecast.goal.rate:
            needed, cycle = _ARRIVALS / self.forecast.goal.rate, 0.5
        else:
            cycle = self.forecast.goal.clients / max(self.forecast.of(settings)[0], 0.1)
            needed = _CYCLES * cycle
        warm_up = max(1.0 if settings in self._open else 2.0, min(1.5 * cycle, 2 * seconds))
        return max(seconds, min(needed, _LONGER * seconds)), warm_up, max(cycle, 0.5)

    def _learn(self) -> None:
        self.ranked = rank(turns_of(self.journal), self.forecast.goal)
        self.forecast = self.forecast.learned([(each.settings, each.speed, each.latency) for each in self.ranked])

    def _left(self) -> float:
        return self.deadline - self.clock()
