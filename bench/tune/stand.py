"""The stand: real servers with the configurations that are measured, all up at the same time."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from beeline.errors import Undetermined
from bench.load import Plan, run
from bench.pictures import Pictures
from bench.tune import variants
from bench.tune.goal import Goal
from bench.tune.ladder import Cost
from bench.tune.model import Model
from bench.tune.settings import Settings
from host import machine
from serve import servers
from serve.addresses import Ports
from serve.client import InferenceClient, ManagementClient
from serve.instance.child import Running
from serve.scale import scale
from serve.up import Request, up

# Java's own start, and the end of the wait for it; seconds.
_JAVA_SECONDS = 4.0
# Workers that start side by side slow each other down.
_CROWDED = 1.3
# TorchServe gives a worker up that takes two minutes.
_BOOT_SECONDS = 60.0
_OF_MEMORY = 0.8
MOST_WORKERS = 48
_SETTLE = 30.0


@dataclass(frozen=True)
class _Place:
    """Where a configuration answers: a server, and the model's name there."""

    running: Running
    name: str

    @property
    def url(self) -> str:
        return f"{self.running.state.backend}/predictions/{self.name}"


@dataclass
class Stand:
    """Real servers, one for each number of threads at each `open`; a context manager that ends them all.

    Attributes:
        model: what is served.
        goal: says how the load is made.
        pictures: what is sent.
        server: `torchserve` or `mms`.
        cost: what one worker takes, from the ladder.
        say: takes lines for people.
    """

    model: Model
    goal: Goal
    pictures: Pictures
    server: str
    cost: Cost
    say: Callable[[str], None]
    _servers: list[Running] = field(default_factory=list)
    _where: dict[Settings, _Place] = field(default_factory=dict)
    _per_worker: float | None = None
    _starts: int = 0

    def __enter__(self) -> Stand:
        self._scratch = tempfile.TemporaryDirectory(prefix="beeline-tune-")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        finally:
            self._scratch.cleanup()

    def open(self, wanted: Sequence[Settings]) -> None:
        """Start servers with configurations that are not there yet, and wait until each answers.

        Raises:
            BeelineError: when a worker does not start.
        """
        for group in together(wanted, self._most_at_once()):
            self._start(group)

    def close(self, settings: Settings) -> None:
        """End a configuration's workers, which gives their memory back."""
        place = self._where.pop(settings, None)
        if place is None:
            return
        with ManagementClient(place.running.state.management) as management:
            if servers.named(self.server).synchronous:
                # MMS ends with the last worker what would fork the next; unregistering is clean.
                management.unregister(place.name, _SETTLE)
            else:
                management.scale(place.name, 0, 0)

    def shrink(self, settings: Settings, workers: int) -> Settings:
        """Take workers away from a configuration; the others stay loaded. Return what it is then."""
        place = self._where[settings]
        scale(place.running.instance, place.running.state, place.name, workers, workers, _silent)
        smaller = replace(settings, workers=workers)
        del self._where[settings]
        self._where[smaller] = place
        return smaller

    def run(self, settings: Settings, seconds: float, warm_up: float) -> dict[str, Any]:
        """Make the load on one configuration and return its summary."""
        place = self._where[settings]
        place.running.check()
        plan = Plan(
            url=place.url,
            pictures=self.pictures,
            seconds=seconds,
            warm_up=warm_up,
            clients=None if self.goal.open else self.goal.clients,
            rate=self.goal.rate,
            deadline=self.goal.deadline,
        )
        summary = run(plan).summary()
        if summary["failed"]:
            self._settle(place)
        return summary

    def opening_seconds(self, wanted: Sequence[Settings]) -> float:
        """Return how long opening them will take, about: as long as the last ones took."""
        workers = sum(settings.workers for settings in wanted)
        each = self._per_worker
        if each is None:
            each = _CROWDED * self.cost.load_seconds / max(1, min(machine.cores(), workers))
        return _JAVA_SECONDS * len(together(wanted, self._most_at_once())) + each * workers

    def room(self) -> int:
        """Return how many more workers memory holds."""
        room = int(_OF_MEMORY * machine.free_memory() / max(1, self.cost.memory))
        if self.cost.device_memory:
            room = min(room, int(_OF_MEMORY * self.cost.device_free / self.cost.device_memory) - self._workers())
        return max(0, min(room, MOST_WORKERS - self._workers()))

    def stop(self) -> None:
        """Stop every server; an interruption meanwhile is told after it."""
        asked: BaseException | None = None
        while self._servers:
            try:
                self._servers[-1].stop()
            except BaseException as error:
                if asked is not None:
                    raise
                asked = error
                continue
            self._servers.pop()
        self._where.clear()
        if asked is not None:
            raise asked

    def _most_at_once(self) -> int:
        """Return how many workers may start side by side, so that none of them is given up."""
        return max(1, int(_BOOT_SECONDS * machine.cores() / (_CROWDED * max(self.cost.load_seconds, 0.1))))

    def _start(self, wanted: Sequence[Settings]) -> None:
        began = time.monotonic()
        self._starts += 1
        folder = Path(self._scratch.name) / str(self._starts)
        folder.mkdir()
        archives, config = variants.write(self.model, wanted, folder)
        request = Request(
            server=self.server,
            wanted=tuple(str(path) for path in archives),
            store=folder,
            config_file=config,
            name=f"tune-{os.getpid()}-{self._starts}",
            ports=Ports(0),
            gateway="none",
        )
        environ = {**variants.environment(os.environ), "BEELINE_STATE": self._scratch.name}
        self._servers.append(up(request, _silent, environ))
        for settings, path in zip(wanted, archives, strict=True):
            self._where[settings] = _Place(self._servers[-1], settings.label)
            # The server has its own link to it.
            path.unlink()
        seconds = time.monotonic() - began
        workers = sum(settings.workers for settings in wanted)
        self._per_worker = max(0.1, (seconds - _JAVA_SECONDS) / workers)
        self.say(f"  {len(wanted)} configurations with {workers} workers answer after {seconds:.1f} s")

    def _settle(self, place: _Place) -> None:
        """Wait until the server has worked off what its clients gave up."""
        with InferenceClient(place.running.state.backend, timeout=_SETTLE, patience=0) as client:
            try:
                client.predict(place.name, self.pictures.bodies[0])
            except Undetermined:
                self.say(f"  {place.name} does not answer a lone request within {_SETTLE:g} s")

    def _workers(self) -> int:
        return sum(settings.workers for settings in self._where)


def together(wanted: Sequence[Settings], most: int) -> list[list[Settings]]:
    """Return what one server is started with: the same threads, and at most so many workers in all."""
    groups: list[list[Settings]] = []
    for settings in sorted(wanted, key=lambda each: each.threads):
        last = groups[-1] if groups else []
        workers = sum(each.workers for each in last) + settings.workers
        if last and last[0].threads == settings.threads and workers <= most:
            last.append(settings)
        else:
            groups.append([settings])
    return groups


def _silent(line: str) -> None:
    """Take a server's own lines: the stand tells in one what came of it."""
