"""The grid of configurations: what the time of a batch makes one expect of each, and why most need no measurement."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from beeline.errors import ConfigError
from bench.sweep import Fit

BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
DELAYS = (1, 2, 10, 30)
# Where no delay ever begins.
_DELAY = 2
_WORKERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
# Processor milliseconds that the server's front end and the load's client take for a request; a no-op model on
# TorchServe answered 1,600 to 2,100 requests a second on two cores, client included.
_FRONT_MS = 1.0
# The 95th percentile of a closed loop lies a little over its mean.
_TAIL = 1.15
# So many times over the budget, over the best forecast, over that at a rate: a forecast may be wrong by less. So many
# configurations stay whatever is forecast.
_OVER, _SLOWER, _SLOWER_AT_RATE, _LEAST = 1.5, 1.67, 2.5, 4
# Of the arrivals at a rate, so many must be answered in the measured time; the rest is under way when it ends.
_ANSWERED = 0.97


def counted(number: int, noun: str) -> str:
    """Return `1 worker` or `2 workers`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@dataclass(frozen=True, order=True)
class Settings:
    """One way to serve a model: requests a batch at most, processes, milliseconds, threads of each process."""

    batch_size: int
    workers: int
    max_batch_delay: int
    threads: int

    def __str__(self) -> str:
        workers, threads = counted(self.workers, "worker"), counted(self.threads, "thread")
        return f"batch {self.batch_size}, {workers}, delay {self.max_batch_delay} ms, {threads} each"

    @property
    def layout(self) -> tuple[int, int]:
        """Threads and workers."""
        return self.threads, self.workers

    @property
    def label(self) -> str:
        """A name of letters, digits and dashes."""
        return f"b{self.batch_size}-w{self.workers}-d{self.max_batch_delay}-t{self.threads}"

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """Return the settings among a row's values."""
        return cls(*(int(values[key]) for key in ("batch_size", "workers", "max_batch_delay", "threads")))


@dataclass(frozen=True)
class Goal:
    """The most throughput of `clients` within `p95_ms` milliseconds, or the lowest p95 at `rate` arrivals a second."""

    p95_ms: float | None = None
    rate: float | None = None
    clients: int = 50

    def __post_init__(self) -> None:
        """Raise `ConfigError` for no goal, two goals, or an impossible number."""
        if (self.p95_ms is None) == (self.rate is None):
            raise ConfigError("tune needs a goal: either --p95, as in --p95 500ms, or --rate, as in --rate 200")
        for option, value in (("--p95", self.p95_ms), ("--rate", self.rate), ("--clients", self.clients)):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{option} is {value:g}; give more than 0")

    @classmethod
    def parse(cls, p95: str | None, rate: float | None, clients: int) -> Goal:
        """Return the goal whose budget is `500ms`, `0.5s` or `500`; raise `ConfigError` for another."""
        text = (p95 or "").lower().replace(" ", "")
        number = text.removesuffix("ms").removesuffix("s")
        try:
            budget = None if p95 is None else float(number) * (1000 if text == number + "s" else 1)
        except ValueError:
            raise ConfigError(f"--p95 is {p95!r}; give milliseconds or seconds, as in 500ms or 0.5s") from None
        return cls(budget, rate, clients)

    @property
    def deadline(self) -> float:
        """Seconds after which a request has failed: ten, or six times the budget."""
        return max(10.0, 6 * (self.p95_ms or 0.0) / 1000)

    def __str__(self) -> str:
        if self.rate is not None:
            return f"{self.rate:g} arrivals a second"
        return f"p95 of at most {self.p95_ms:g} ms with {self.clients} clients"

    def holds(self, per_second: float, p95_ms: float | None, failed: int, growing: bool) -> bool:
        """Say whether figures reach it; a failed request never does."""
        if failed or p95_ms is None:
            return False
        if self.rate is not None:
            return not growing and per_second >= _ANSWERED * self.rate
        return p95_ms <= (self.p95_ms or 0.0)

    def to_dict(self) -> dict[str, float]:
        """Return it as a record has it."""
        return {key: value for key, value in asdict(self).items() if key != "clients" and value is not None}


@dataclass(frozen=True)
class Forecast:
    """What to expect of configurations on a machine with so many cores, under the goal's load.

    `lines` has by threads what a batch takes outside of any server; `paces` by threads and workers the logarithm of
    measured over expected speed: neighbours on the chip slow each other down.
    """

    lines: Mapping[int, Fit]
    goal: Goal
    cores: int
    paces: Mapping[tuple[int, int], float] = field(default_factory=dict)

    def of(self, settings: Settings) -> tuple[float, float]:
        """Return answers a second and the 95th percentile in milliseconds, which is infinite where ever more wait."""
        (per_second, p95_ms), pace = self._unpaced(settings), 1.0
        if self.paces:
            # A layout that was not measured goes like the one most like it.
            threads, workers = settings.layout
            nearest = min(self.paces, key=lambda each: (abs(each[0] - threads), abs(each[1] - workers), each))
            pace = math.exp(self.paces[nearest])
        return per_second if self.goal.rate else per_second * pace, p95_ms / pace

    def text(self, settings: Settings) -> str:
        """Return the same for people."""
        per_second, p95_ms = self.of(settings)
        wait = f"p95 {p95_ms:.0f} ms" if math.isfinite(p95_ms) else "ever more waiting"
        return f"expected {per_second:.0f} answers a second, {wait}"

    def learned(self, measured: Sequence[tuple[Settings, float, float]]) -> Forecast:
        """Return a forecast that knows settings with the logarithms of their answers a second and their p95."""
        paces: dict[tuple[int, int], list[float]] = {}
        for settings, speed, p95 in measured:
            per_second, p95_ms = self._unpaced(settings)
            if math.isfinite(p95_ms):
                pace = math.log(p95_ms) - p95 if self.goal.rate else speed - math.log(per_second)
                paces.setdefault(settings.layout, []).append(pace)
        return replace(self, paces={layout: statistics.mean(own) for layout, own in paces.items()})

    def _unpaced(self, settings: Settings) -> tuple[float, float]:
        workers, threads, most = settings.workers, settings.threads, float(settings.batch_size)
        if self.goal.rate is None:
            size = min(most, max(1.0, self.goal.clients / workers))
            # A batch that its worker's clients cannot fill waits for them all the delay.
            per_second = self._capacity(settings, size, settings.max_batch_delay if size < most else 0.0)
            # Little's law: clients that each have one request under way, over the throughput.
            return per_second, _TAIL * 1000 * self.goal.clients / per_second
        capacity = self._capacity(settings, most, 0.0)
        if self.goal.rate >= capacity:
            return capacity, math.inf
        # What arrives at a worker while it has a batch makes its next one: n = r (a n + b).
        line, each_ms, busy = self.lines[threads], self.goal.rate / workers / 1000, self.goal.rate / capacity
        size = line.b_ms * each_ms / (1 - line.a_ms * each_ms) if line.a_ms * each_ms < 1 else most
        size = min(most, max(1.0, size))
        wait = settings.max_batch_delay if size < most else 0.0
        return self.goal.rate, wait + 2 * self._batch_ms(threads, size) * (1 + busy / (2 * (1 - busy)))

    def _capacity(self, settings: Settings, size: float, idle_ms: float) -> float:
        """Return the most answers a second with batches of that size, each after `idle_ms` of waiting."""
        batch = self._batch_ms(settings.threads, size)
        by_workers = 1000 * settings.workers * size / (batch + idle_ms)
        return min(by_workers, 1000 * self.cores / (settings.threads * batch / size + _FRONT_MS))

    def _batch_ms(self, threads: int, size: float) -> float:
        return max(self.lines[threads].a_ms, 1e-3) * size + max(self.lines[threads].b_ms, 0.0)


def thread_counts(cores: int) -> tuple[int, ...]:
    """Return the numbers of threads a worker may get: 1, 2, 4 ... up to the cores, and at most 16."""
    return tuple(sorted({2**power for power in range(5) if 2**power <= cores} | {min(cores, 16)}))


def candidates(forecast: Forecast, room: int, also: Settings) -> tuple[list[Settings], dict[str, str]]:
    """Return the configurations that are worth measuring, best forecast first, and why each other is not.

    `room` is how many workers memory holds; `also` stays whatever is forecast.
    """
    pruned: dict[str, str] = {}
    combinations = {also, *(each for threads in forecast.lines for each in _layouts(forecast, threads, room, pruned))}
    expected = {settings: forecast.of(settings) for settings in combinations}
    order = sorted(combinations, key=lambda each: (expected[each][1], -expected[each][0], each))
    goal, best = forecast.goal, expected[order[0]][1]
    most = _SLOWER_AT_RATE * best if goal.rate else min(_SLOWER * best, _OVER * max(best, goal.p95_ms or 0.0))
    promising = [each for i, each in enumerate(order) if expected[each][1] < most or i < _LEAST or each == also]
    for settings in sorted(combinations - set(promising)):
        pruned[str(settings)] = f"{forecast.text(settings)}, far from the best, p95 {best:.0f} ms, or from {goal}"
    return promising, pruned


def _layouts(forecast: Forecast, threads: int, room: int, pruned: dict[str, str]) -> Iterator[Settings]:
    """Yield the settings that can differ for workers of so many threads; say in `pruned` why others cannot."""
    goal, cores = forecast.goal, forecast.cores
    delays = list(DELAYS)
    if goal.p95_ms:
        delays = [delay for delay in DELAYS[1:] if 2 * delay < goal.p95_ms] or [DELAYS[0]]
        for delay in set(DELAYS) - set(delays):
            cost = f"it would take half of the {goal.p95_ms:g} ms alone"
            pruned[f"delay {delay} ms"] = cost if delay > delays[0] else f"{delays[0]} ms cost a closed loop no more"
    pruned["batch 1 with other delays"] = "a batch of 1 never waits"
    for workers in _WORKERS:
        what = f"{counted(workers, 'worker')} of {counted(threads, 'thread')}"
        if workers * threads > 2 * cores or workers > room:
            crowd = f"{workers * threads} threads would share {cores} cores"
            pruned[f"{what}, and more workers"] = crowd if workers <= room else f"memory holds {room} workers"
            return
        if 4 * workers * threads <= cores:
            pruned[what] = f"{counted(workers * threads, 'thread')} would leave most of {cores} cores idle"
            continue
        share = math.inf if goal.rate else goal.clients / workers
        fill = next((size for size in BATCHES if size >= share), BATCHES[-1])
        if fill < BATCHES[-1]:
            pruned[f"batch over {fill} with {what}"] = f"{goal.clients} clients are {share:.3g} for each worker"
        full = [size for size in BATCHES if not goal.rate and goal.clients >= (workers + 1) * size] or [1]
        if full[-1] > 1:
            why = f"{goal.clients} clients keep a whole batch waiting, so that no delay begins"
            pruned[f"batch 2 to {full[-1]} with {what} and other delays"] = why
        for size in BATCHES[: BATCHES.index(fill) + 1]:
            for delay in delays if size > full[-1] else [_DELAY]:
                yield Settings(size, workers, delay, threads)
