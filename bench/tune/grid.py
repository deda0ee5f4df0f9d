"""The grid of configurations: the forecast of each from a batch's time, and why most need no measurement."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from beeline.errors import ConfigError
from bench.sweep import Fit

BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
WORKERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
DELAYS = (2, 10, 30)
THREADS = (1, 2, 4, 8, 16)
# CPU milliseconds of the server's front end and the load's client for a request; a no-op model on TorchServe answered
# 1,600 to 2,100 requests a second on two cores, client included.
_FRONT_MS = 1.0
# A configuration whose forecast is so many times the best one's is not measured: forecasts err by less.
_SLOWER = 2.0
# The share of a rate's arrivals that must be answered in the measured time; the others are still under way at its end.
_ANSWERED = 0.97
# The least cost of a configuration that answers nothing, or whose requests wait longer and longer.
_ENDLESS_MS = 600_000.0


@dataclass(frozen=True, order=True)
class Settings:
    """One way to serve a model: the most requests of a batch, processes, milliseconds, threads of each process."""

    batch_size: int
    workers: int
    max_batch_delay: int
    threads: int

    def __str__(self) -> str:
        delay = f"delay {self.max_batch_delay} ms"
        return f"batch size {self.batch_size}, workers {self.workers}, threads {self.threads}, {delay}"

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
        if (self.p95_ms is None) == (self.rate is None):
            raise ConfigError("tune needs a goal: either --p95, as in --p95 500ms, or --rate, as in --rate 200")

    @classmethod
    def parse(cls, p95: str | None, rate: float | None, clients: int) -> Goal:
        """Return the goal with a budget such as `500ms`, `0.5s` or `500`; raise `ConfigError` for another text."""
        if p95 is None:
            return cls(None, rate, clients)
        match = re.fullmatch(r"(\d*\.?\d+)(ms|s|)", p95.lower().replace(" ", ""))
        if match is None or not float(match[1]):
            raise ConfigError(f"--p95 is {p95!r}; give milliseconds or seconds, as in 500ms or 0.5s")
        return cls(float(match[1]) * (1000 if match[2] == "s" else 1), rate, clients)

    def __str__(self) -> str:
        if self.rate is not None:
            return f"{self.rate:g} arrivals a second"
        return f"p95 of at most {self.p95_ms:g} ms with {self.clients} clients"

    def holds(self, turn: Turn) -> bool:
        """Say whether a turn reaches it; one with a failed request never does."""
        if turn.failed or turn.p95_ms is None:
            return False
        if self.rate is not None:
            return not turn.growing and turn.per_second >= _ANSWERED * self.rate
        return turn.p95_ms <= (self.p95_ms or 0.0)

    def cost(self, per_second: float, p95_ms: float | None) -> float:
        """Return the milliseconds to minimise: at a rate the p95, else an answer's mean by Little's law."""
        if self.rate is not None:
            return p95_ms or _ENDLESS_MS
        return 1000 * self.clients / max(per_second, 1e-3)

    def to_dict(self) -> dict[str, float]:
        """Return a record's JSON values."""
        return {key: value for key, value in asdict(self).items() if key != "clients" and value is not None}


@dataclass(frozen=True)
class Turn:
    """The figures of one configuration under one load, or under several: medians, and all failures."""

    settings: Settings
    seconds: float
    per_second: float
    p95_ms: float | None  # None without an answer
    failed: int
    cost: float  # as by `Goal.cost`; of several turns corrected for the machine's drift
    growing: bool = False  # whether more and more arrivals waited
    turns: int = 1

    def __str__(self) -> str:
        p95 = "no answer" if self.p95_ms is None else f"p95 {self.p95_ms:.0f} ms"
        notes = f", {self.failed} failed" * bool(self.failed) + ", more and more wait" * self.growing
        return f"{self.settings}: {self.per_second:.1f} requests a second, {p95}{notes}"

    def row(self, goal: Goal) -> dict[str, Any]:
        """Return it as a record has it."""
        figures = {"per_second": round(self.per_second, 2), "p95_ms": self.p95_ms and round(self.p95_ms, 2)}
        counts = {"failed": self.failed, "turns": self.turns, "seconds": round(self.seconds, 1)}
        return {**asdict(self.settings), **figures, **counts, "holds": goal.holds(self)}


@dataclass(frozen=True)
class Forecast:
    """The `Goal.cost` to expect of configurations on a machine with so many cores, under the goal's load."""

    lines: Mapping[int, Fit]  # by threads, a batch's time outside of any server
    goal: Goal
    cores: int
    # By layout, the measured cost over the expected one: neighbours on the chip slow each other down.
    paces: Mapping[tuple[int, int], float] = field(default_factory=dict)

    def of(self, settings: Settings) -> float:
        """Return the expected `Goal.cost` in milliseconds."""
        threads, workers = settings.layout
        # A layout that was not measured has the pace of the most similar one.
        near = min(self.paces, key=lambda each: (abs(each[0] - threads), abs(each[1] - workers), each), default=None)
        return self._unpaced(settings) * (self.paces[near] if near else 1.0)

    def text(self, settings: Settings) -> str:
        """Return the same for people."""
        cost = self.of(settings)
        return f"{cost:.0f} ms an answer are expected" if cost < _ENDLESS_MS else "longer and longer waits are expected"

    def learned(self, measured: Sequence[Turn]) -> Forecast:
        """Return a forecast with the paces of measured turns."""
        paces: dict[tuple[int, int], list[float]] = {}
        for turn in measured:
            if (expected := self._unpaced(turn.settings)) < _ENDLESS_MS:
                paces.setdefault(turn.settings.layout, []).append(turn.cost / expected)
        return replace(self, paces={layout: statistics.geometric_mean(own) for layout, own in paces.items()})

    def _unpaced(self, settings: Settings) -> float:
        workers, threads, most = settings.workers, settings.threads, float(settings.batch_size)
        if self.goal.rate is None:
            size = min(most, max(1.0, self.goal.clients / workers))
            # A batch that its worker's clients cannot fill waits for the whole delay.
            wait = settings.max_batch_delay if size < most else 0.0
            return 1000 * self.goal.clients / self._capacity(settings, size, wait)
        capacity = self._capacity(settings, most, 0.0)
        if self.goal.rate >= capacity:
            return _ENDLESS_MS * self.goal.rate / capacity
        # A worker's next batch is what arrives while it has a batch: n = r (a n + b).
        line, each_ms, busy = self.lines[threads], self.goal.rate / workers / 1000, self.goal.rate / capacity
        size = line.b_ms * each_ms / (1 - line.a_ms * each_ms) if line.a_ms * each_ms < 1 else most
        size = min(most, max(1.0, size))
        wait = settings.max_batch_delay if size < most else 0.0
        return wait + 2 * (line.a_ms * size + line.b_ms) * (1 + busy / (2 * (1 - busy)))

    def _capacity(self, settings: Settings, size: float, idle_ms: float) -> float:
        """Return the most answers a second with batches of that size, each after `idle_ms`."""
        batch = self.lines[settings.threads].a_ms * size + self.lines[settings.threads].b_ms
        by_workers = 1000 * settings.workers * size / (batch + idle_ms)
        return min(by_workers, 1000 * self.cores / (settings.threads * batch / size + _FRONT_MS))


def delays(settings: Settings, goal: Goal) -> list[Settings]:
    """Return the same settings with each delay under half of the budget; none where no batch waits."""
    waits = settings.batch_size > 1 and (goal.rate or goal.clients < (settings.workers + 1) * settings.batch_size)
    fitting = [delay for delay in DELAYS if waits and 2 * delay < (goal.p95_ms or math.inf)]
    return [replace(settings, max_batch_delay=delay) for delay in fitting]


def candidates(forecast: Forecast, room: int, also: Settings) -> tuple[list[Settings], dict[str, str]]:
    """Return what is worth measuring with the shortest delay, best forecast first, and why the rest is not.

    `room` is how many workers fit into memory; `also` is kept whatever its forecast.
    """
    goal, cores, expected = forecast.goal, forecast.cores, {also: forecast.of(also)}
    why = {"longer delays": "tried only with the best, where its batches wait, below half of the budget"}
    for threads in forecast.lines:
        least, most = cores // (4 * threads) + 1, max(1, min(room, 2 * cores // threads))
        what = f"other workers than {least} to {most} of threads {threads}"
        why[what] = f"fewer leave {cores} cores idle, more crowd them, and memory holds {room}"
        for workers in (count for count in WORKERS if least <= count <= most):
            for smaller, size in itertools.pairwise((0, *BATCHES)):
                settings = Settings(size, workers, DELAYS[0], threads)
                if goal.p95_ms and smaller * workers >= goal.clients:
                    why[f"batch sizes over {smaller} of workers {workers}"] = f"{goal.clients} clients never fill one"
                    break
                expected[settings] = forecast.of(settings)
    order = sorted(expected, key=lambda each: (expected[each], each))
    promising = [each for each in order if expected[each] < _SLOWER * expected[order[0]] or each == also]
    for settings in sorted(expected.keys() - promising):
        why[str(settings)] = f"{forecast.text(settings)}, far from the best ({forecast.text(order[0])})"
    return promising, why
