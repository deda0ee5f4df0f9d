"""A fake of the real servers: latencies that the forecast does not know, drift, noise, a clock."""

from __future__ import annotations

import itertools
import math
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest

import host.machine
from bench.record import Journal
from bench.tune import Search
from bench.tune.grid import BATCHES, DELAYS, Goal, Settings, Turn
from bench.tune.server import Servers
from host import processes
from serve.instance import MARK

CONFIGURED = Settings(8, 1, 2, 2)


class TimeUp(Exception):
    """The alarm of a fake."""


@dataclass(frozen=True)
class Machine:
    """Milliseconds of a picture (on one thread) and of a batch, and what a process alone does not show.

    `gain` is how much faster two threads are than one, `crowd` by how much each other busy worker slows a worker down,
    `large` by how much longer a picture takes in a batch over 16, `pauses` a worker's milliseconds between two batches.
    """

    a_ms: float = 30.0
    b_ms: float = 12.0
    cores: int = 2
    gain: float = 1.6
    crowd: float = 0.12
    large: float = 0.08
    pauses: float = 3.0

    def batch_ms(self, threads: int, size: float) -> float:
        """Return a batch's time on a lone worker."""
        a = self.a_ms / self.gain ** math.log2(threads) * (1 + self.large * (size > 16))
        return a * size + self.b_ms

    def truth(self, settings: Settings, goal: Goal) -> tuple[float, float, bool]:
        """Return answers a second, 95th percentile in ms, and whether ever more wait."""
        slow = (1 + self.crowd * (settings.workers - 1)) * max(1.0, settings.workers * settings.threads / self.cores)
        most = self._rate(settings, settings.batch_size, slow, 0.0)
        if goal.rate is not None:
            if goal.rate >= most:
                return most, 30_000.0, True
            size = 1.0
            for _ in range(30):
                busy_ms = slow * self.batch_ms(settings.threads, size) + self.pauses
                size = min(settings.batch_size, max(1.0, goal.rate * busy_ms / 1000 / settings.workers))
            busy = goal.rate / most
            return goal.rate, settings.max_batch_delay + busy_ms * (1.6 + 0.7 * busy / (1 - busy)), False
        share = goal.clients / settings.workers
        size = min(settings.batch_size, share)
        # A batch that is not full is filled a little better by waiting.
        idle = 0.0
        if share < settings.batch_size * (settings.workers + 1) / settings.workers:
            size *= 0.75 + 0.25 * min(1.0, settings.max_batch_delay / 10)
            idle = 0.6 * settings.max_batch_delay
        rate = self._rate(settings, max(1.0, size), slow, idle)
        return rate, 1120 * goal.clients / rate + 0.2 * slow * self.batch_ms(settings.threads, size), False

    def _rate(self, settings: Settings, size: float, slow: float, idle: float) -> float:
        return 1000 * settings.workers * size / (slow * self.batch_ms(settings.threads, size) + self.pauses + idle)


@dataclass
class FakeServer:
    """A fake: answers with its machine's figures, noise and drift, and lets its clock go on meanwhile."""

    machine: Machine
    goal: Goal
    seed: int = 0
    noise: float = 0.03
    drift: float = 0.05
    now: float = 0.0
    interrupt_at: float = math.inf
    alarm: float = math.inf
    most_workers: int = 40
    start: float = 2.0
    journal: Journal | None = None
    opened: set[Settings] = field(default_factory=set)
    runs: list[Settings] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._level = 0.0

    def clock(self) -> float:
        return self.now

    def open(self, wanted: Sequence[Settings]) -> None:
        if sum(settings.workers for settings in self.opened | set(wanted)) > self.most_workers:
            self.stop()
        missing = set(wanted) - self.opened
        self._spend(self.opening_seconds(missing) if missing else 0)
        self.opened |= missing

    def stop(self) -> None:
        self.opened.clear()

    def opening_seconds(self, wanted: Collection[Settings]) -> float:
        return 4 + self.start * sum(settings.workers for settings in wanted)

    def room(self) -> int:
        return self.most_workers

    def run(self, settings: Settings, seconds: float, warm_up: float) -> Turn:
        assert settings in self.opened
        self._spend(seconds + warm_up + 0.5)
        self.runs.append(settings)
        self._level = 0.8 * self._level + self.random.gauss(0, 0.6 * self.drift)
        noise = self.random.gauss(0, self.noise * math.sqrt(5 / seconds)) + self._level
        rate, p95, growing = self.machine.truth(settings, self.goal)
        rate = rate if self.goal.rate is not None and not growing else rate * math.exp(noise)
        p95 *= math.exp(-noise)
        return Turn(settings, seconds, rate, p95, 0, self.goal.cost(rate, p95), growing)

    def _spend(self, seconds: float) -> None:
        """Let time go by; an interruption or the alarm comes in the middle of it."""
        end = min(self.alarm, self.interrupt_at)
        if end <= self.now + seconds:
            self.now = end
            raise TimeUp if self.alarm < self.interrupt_at else KeyboardInterrupt
        self.now += seconds


@dataclass
class Trial:
    """A search on the fake, and its journal."""

    machine: Machine
    goal: Goal
    journal: Journal
    server: FakeServer
    seconds: float = 240.0

    def run(self) -> None:
        """Search until it ends by itself or its time is up."""
        for threads, size in itertools.product((1, 2), () if self.journal.of("batch") else (1, 2, 4, 8, 16, 32)):
            self.journal.add("batch", [threads, size, self.machine.batch_ms(threads, size)])
        deadline = self.server.now + self.seconds
        self.server.alarm, self.server.journal = min(self.server.alarm, deadline), self.journal
        with suppress(TimeUp):
            Search(cast(Servers, self.server), CONFIGURED, lambda line: None, deadline, self.server.clock).run()

    def again(self) -> Trial:
        """The same, resumed from the file by another process."""
        server = replace(self.server, opened=set(), runs=[], interrupt_at=math.inf, alarm=math.inf)
        return replace(self, journal=Journal.job(self.journal.path, {}), server=server)


def every(machine: Machine) -> list[Settings]:
    """Return all configurations of the fake."""
    layouts = [(workers, threads) for workers in (1, 2, 3, 4) for threads in (1, 2) if workers * threads <= 4]
    return [Settings(size, w, delay, t) for size, (w, t), delay in itertools.product(BATCHES, layouts, DELAYS)]


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short folder for everything temporary (sockets have short paths), in an environment without our variables."""
    folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp")).resolve()
    for name in [name for name in os.environ if name.startswith(("BEELINE_", "BATCH_SIZE", "WORKERS", "LINGER_MS"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("BEELINE_STATE", str(folder / "state"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield folder
    processes.stop_marked(MARK, str(folder), grace=0, folder=folder)
    shutil.rmtree(folder, ignore_errors=True)


def left(folder: Path) -> list[Any]:
    """Return processes and temporary folders that are still there."""
    return [*processes.marked(MARK, str(folder), folder), *folder.glob("beeline-*")]


MakeTrial = Callable[..., Trial]


@pytest.fixture
def make_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeTrial:
    """Make a search on a fake server, with an empty journal."""

    def make(goal: Goal, machine: Machine | None = None, seconds: float = 240.0, **options: Any) -> Trial:
        machine = machine or Machine()
        monkeypatch.setattr(host.machine, "cores", lambda: machine.cores)
        journal = Journal.job(tmp_path / f"{len(list(tmp_path.iterdir()))}.journal", {})
        return Trial(machine, goal, journal, FakeServer(machine, goal, **options), seconds)

    return make
