"""What the ladder makes one expect of a configuration under load, and what measuring its neighbours adds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from bench.ladder.fit import Fit, fit
from bench.tune.goal import Goal
from bench.tune.settings import Settings
from bench.tune.standing import Standing

# Processor milliseconds that the server's front end and the load's client take for a request; a no-op
# model on TorchServe answered 1,600 to 2,100 requests a second on two cores, client included.
_FRONT_MS = 1.0
# The 95th percentile of a closed loop lies a little over its mean.
_TAIL = 1.15
# A line that misses a point by more than this hides a bend, such as batches that leave the cache.
_BENT = 0.12

Layout = tuple[int, int]


@dataclass(frozen=True)
class Curve:
    """What a batch takes with one number of threads: the ladder's points and the line through them."""

    points: tuple[tuple[int, float], ...]
    line: Fit

    @classmethod
    def through(cls, points: Sequence[tuple[int, float]]) -> Curve:
        """Fit the line; through one point alone goes the one without a fixed cost."""
        size, milliseconds = points[0]
        return cls(tuple(sorted(points)), fit(points) or Fit(milliseconds / size, 0.0, 1.0))

    def milliseconds(self, size: float) -> float:
        """Return what a batch of that size takes: the line, or where that misses the points, between them."""
        sizes, times = zip(*self.points, strict=True)
        if self.line.error > _BENT and sizes[0] <= size <= sizes[-1]:
            return float(np.interp(size, sizes, times))
        return max(max(self.line.a_ms, 1e-3) * size + max(self.line.b_ms, 0.0), 1e-3)


@dataclass(frozen=True)
class Forecast:
    """Expected answers a second, 95th percentile in milliseconds, requests a batch."""

    per_second: float
    p95_ms: float
    batch: float


@dataclass(frozen=True)
class Forecaster:
    """Forecasts configurations of one model on one machine.

    Attributes:
        curves: what a batch takes, for each number of threads.
        goal: says how the load is made.
        cores: processor cores.
        paces: by workers and threads, logarithms of measured over expected speed at the logarithm of each
            measured batch size: neighbours on the chip slow each other down, each layout in its own way.
    """

    curves: Mapping[int, Curve]
    goal: Goal
    cores: int
    paces: Mapping[Layout, tuple[tuple[float, float], ...]] = field(default_factory=dict)

    def of(self, settings: Settings) -> Forecast:
        """Return the forecast of one configuration."""
        plain, pace = self._plain(settings), math.exp(self._pace(settings))
        if self.goal.open:
            return replace(plain, p95_ms=plain.p95_ms / pace)
        return replace(plain, per_second=plain.per_second * pace, p95_ms=plain.p95_ms / pace)

    def learned(self, measured: Sequence[Standing]) -> Forecaster:
        """Return a forecaster that knows what was measured; between batch sizes it goes straight."""
        found: dict[Layout, dict[float, list[float]]] = {}
        for standing in measured:
            settings, plain = standing.settings, self._plain(standing.settings)
            if standing.p95_ms is None or math.isinf(plain.p95_ms):
                continue
            pace = math.log(plain.p95_ms) - standing.delay
            if not self.goal.open:
                pace = standing.speed - math.log(plain.per_second)
            sizes = found.setdefault((settings.workers, settings.threads), {})
            sizes.setdefault(math.log2(settings.batch_size), []).append(pace)
        paces = {
            layout: tuple((size, statistics.mean(own)) for size, own in sorted(sizes.items()))
            for layout, sizes in found.items()
        }
        return replace(self, paces=paces)

    def steps_from_measured(self, settings: Settings) -> float:
        """Return how many doublings of the batch the nearest measured configuration of the layout is away."""
        sizes = [size for size, _ in self.paces.get((settings.workers, settings.threads), ())]
        return min((abs(size - math.log2(settings.batch_size)) for size in sizes), default=2.0)

    def _pace(self, settings: Settings) -> float:
        if not self.paces:
            return 0.0
        # Of a layout that was not measured, the one most like it tells.
        wanted = (settings.threads, settings.workers)
        nearest = min(self.paces, key=lambda each: (abs(each[1] - wanted[0]), abs(each[0] - wanted[1]), each))
        sizes, paces = zip(*self.paces[nearest], strict=True)
        return float(np.interp(math.log2(settings.batch_size), sizes, paces))

    def _plain(self, settings: Settings) -> Forecast:
        return self._open(settings) if self.goal.open else self._closed(settings)

    def _capacity(self, settings: Settings, size: float, idle_ms: float = 0.0) -> float:
        """Return the most answers a second with batches of that size, each after `idle_ms` of waiting."""
        batch = self.curves[settings.threads].milliseconds(size)
        workers = 1000 * settings.workers * size / (batch + idle_ms)
        work = settings.threads * batch / size + _FRONT_MS
        return min(workers, 1000 * self.cores / work)

    def _closed(self, settings: Settings) -> Forecast:
        share = max(1.0, self.goal.clients / settings.workers)
        size = min(float(settings.batch_size), share)
        # A batch that its worker's clients cannot fill waits for them all the delay.
        idle = settings.max_batch_delay if size < settings.batch_size else 0.0
        per_second = self._capacity(settings, size, idle)
        # Little's law: clients that each have one request under way, over the throughput.
        return Forecast(per_second, _TAIL * 1000 * self.goal.clients / per_second, size)

    def _open(self, settings: Settings) -> Forecast:
        rate = self.goal.rate or 0.0
        most = self._capacity(settings, settings.batch_size)
        if rate >= most:
            return Forecast(most, math.inf, float(settings.batch_size))
        size, wait, curve = 1.0, 0.0, self.curves[settings.threads]
        for _ in range(50):
            # What arrives at a worker while it has a batch makes its next one.
            arrived = rate / settings.workers * (curve.milliseconds(size) + wait) / 1000
            size = min(float(settings.batch_size), max(1.0, arrived))
            wait = settings.max_batch_delay if size < settings.batch_size else 0.0
        busy = rate / most
        return Forecast(rate, wait + 2 * curve.milliseconds(size) * (1 + busy / (2 * (1 - busy))), size)
