"""Where a tuning measures: a batch in a sandbox, and real servers with one archive under a name a configuration."""

from __future__ import annotations

import itertools
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import javaproperties

from archive import mar, store
from archive.mar import Archive
from archive.sandbox import OutOfMemory, Sandbox
from beeline.errors import Undetermined
from bench.load import Plan, run
from bench.pictures import Pictures
from bench.tune.grid import Goal, Settings
from host import machine
from host.files import sha256
from serve import config, properties
from serve.addresses import Ports
from serve.client import InferenceClient
from serve.instance.child import Running
from serve.properties import Properties
from serve.servers.protocol import MALLOC
from serve.up import Request, up

MOST_WORKERS = 48
# What is sent of a folder is at most so many pictures; batches are timed with the first of them.
MOST_PICTURES, _TIMED = 200, 32
_SIZES = (1, 2, 4, 8, 16, 32)
# Seconds of Java's own start; workers that start together slow each other down.
_JAVA_SECONDS, _CROWDED = 4.0, 1.3
_OF_MEMORY, _SETTLE_SECONDS, _STARTUP_SECONDS, _LOAD_SECONDS = 0.8, 30.0, 600, 180.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)


@dataclass(frozen=True)
class Model:
    """An archive with its file's sha256, the configuration file with the environment over it, and what that says."""

    archive: Archive
    sha256: str
    properties: Properties
    configured: Settings


def find_model(wanted: str, folder: Path, config_file: Path, environ: Mapping[str, str]) -> Model:
    """Return the model of an archive by its path, or by its name in the store.

    Raises:
        BeelineError: when it is not there, is not built by Beeline, or the configuration has a mistake.
    """
    archive = store.find_archives(folder, (str(Path(wanted).resolve()) if Path(wanted).is_file() else wanted,))[0]
    mar.check(archive.path)
    numbers = properties.load(config_file, environ)
    gpus = 0 if environ.get("BEELINE_DEVICE") == "cpu" else len(machine.gpus())
    resolved = config.resolve(numbers, (archive,), config.Overrides(), environ, machine.cores(), gpus)
    now = resolved.models[0]
    values = (now.batch_size, now.min_workers, now.max_batch_delay, resolved.threads)
    return Model(archive, sha256(archive.path), numbers, Settings(*(setting.value for setting in values)))


@dataclass(frozen=True)
class Cost:
    """What one worker takes: bytes of memory, seconds to load, bytes of a CUDA device's memory; what that has free."""

    memory: int = 1 << 30
    load_seconds: float = 6.0
    device_memory: int = 0
    device_free: int = 0


def time_batches(model: Model, pictures: Pictures, threads: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Time batches of growing sizes with so many threads, in a process of its own; see `Sandbox.time_batches`."""
    names = ("OMP_NUM_THREADS", "BEELINE_THREADS", "BEELINE_LONE_THREADS")
    # A worker may hold a second model for a picture that comes alone, which costs memory.
    lone = model.properties.numbers.get("beeline_lone_threads") or min(machine.cores(), config.LONE)
    environment = MALLOC | dict.fromkeys(names, str(threads))
    with Sandbox(model.archive.path, load_seconds=_LOAD_SECONDS, environment=environment) as sandbox:
        sandbox.take(pictures.bodies[:_TIMED])
        with suppress(OutOfMemory):
            yield from sandbox.time_batches(_SIZES, seconds, lone)


class Servers:
    """Real servers, one for each number of threads at each `open`; a context manager that stops them all.

    Neither server changes a model's batch size or delay while it runs, and TorchServe takes no other model then. So one
    archive has several names, and a turn of one configuration follows a turn of another at once: workers without
    requests take memory and no processor time.
    """

    def __init__(
        self, model: Model, goal: Goal, pictures: Pictures, server: str, cost: Cost, say: Callable[[str], None]
    ) -> None:
        self.model, self.goal, self.pictures, self.server, self.cost, self.say = (
            model,
            goal,
            pictures,
            server,
            cost,
            say,
        )
        self._running: dict[Settings, Running] = {}
        self._stack = ExitStack()
        self._starts, self._per_worker = 0, _CROWDED * cost.load_seconds / machine.cores()

    def __enter__(self) -> Servers:
        self._scratch = tempfile.TemporaryDirectory(prefix="beeline-tune-")
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.stop()
        finally:
            self._scratch.cleanup()

    def open(self, wanted: Sequence[Settings]) -> None:
        """Start servers with configurations that are not there yet, and wait until each answers.

        Raises:
            BeelineError: when a worker does not start.
        """
        for _, group in itertools.groupby(sorted(wanted, key=lambda each: each.threads), lambda each: each.threads):
            self._start(list(group))

    def run(self, settings: Settings, seconds: float, warm_up: float) -> dict[str, Any]:
        """Make the load on one configuration and return its summary."""
        running, goal = self._running[settings], self.goal
        running.check()
        url, clients = f"{running.state.backend}/predictions/{settings.label}", None if goal.rate else goal.clients
        plan = Plan(url, self.pictures, seconds, warm_up, clients, goal.rate, deadline=goal.deadline)
        summary = run(plan).summary()
        if summary["failed"]:
            # The next turn waits until the server has answered what its clients gave up.
            client = InferenceClient(running.state.backend, timeout=_SETTLE_SECONDS, patience=0)
            with client, suppress(Undetermined):
                client.predict(settings.label, self.pictures.bodies[0])
        return summary

    def opening_seconds(self, wanted: Sequence[Settings]) -> float:
        """Return how long opening them will take, about: as long as the last ones took."""
        groups = len({settings.threads for settings in wanted})
        return _JAVA_SECONDS * groups + self._per_worker * sum(settings.workers for settings in wanted)

    def room(self) -> int:
        """Return how many more workers memory holds."""
        running = sum(settings.workers for settings in self._running)
        rooms = [MOST_WORKERS - running, int(_OF_MEMORY * machine.free_memory() / max(1, self.cost.memory))]
        if self.cost.device_memory:
            rooms.append(int(_OF_MEMORY * self.cost.device_free / self.cost.device_memory) - running)
        return max(0, min(rooms))

    def stop(self) -> None:
        """Stop every server; a signal meanwhile takes effect after it."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._running.clear()
            self._stack.close()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _start(self, wanted: Sequence[Settings]) -> None:
        began = time.monotonic()
        self._starts += 1
        folder = Path(self._scratch.name) / str(self._starts)
        folder.mkdir()
        archives = tuple(str(mar.renamed(self.model.archive.path, each.label, folder)) for each in wanted)
        name, numbers = f"tune-{os.getpid()}-{self._starts}", configuration(self.model, wanted, folder)
        request = Request(self.server, archives, folder, numbers, name, ports=Ports(0), gateway="none")
        # The configuration has what these say already.
        own = {*properties.VARIABLES, "BATCH_SIZE", "WORKERS", "LINGER_MS"}
        environ = {name: value for name, value in os.environ.items() if name not in own}
        running = up(request, lambda line: None, {**environ, "BEELINE_STATE": self._scratch.name})
        self._stack.enter_context(running)
        self._running |= dict.fromkeys(wanted, running)
        for path in archives:
            # The server has its own link to it.
            Path(path).unlink()
        seconds, workers = time.monotonic() - began, sum(settings.workers for settings in wanted)
        self._per_worker = max(0.1, (seconds - _JAVA_SECONDS) / workers)
        self.say(f"  {len(wanted)} configurations with {workers} workers answer after {seconds:.1f} s")


def configuration(model: Model, wanted: Sequence[Settings], folder: Path) -> Path:
    """Write the person's own numbers into a folder, with these settings in place of the models; ports are free ones."""
    version, startup = model.archive.version, {"startupTimeout": _STARTUP_SECONDS}
    entries = {each.label: {version: numbers_of(each) | startup} for each in wanted}
    values = {key: str(value) for key, value in model.properties.numbers.items()}
    values |= {key: value for key, value in model.properties.texts.items() if key == "vmargs"}
    values |= {"beeline_threads": str(wanted[0].threads), "models": json.dumps(entries)}
    path = folder / "config.properties"
    with path.open("w", encoding="utf-8") as file:
        javaproperties.dump(values, file, timestamp=False)
    return path


def numbers_of(settings: Settings) -> dict[str, int]:
    """Return a model's numbers as `models` has them."""
    workers = {"minWorkers": settings.workers, "maxWorkers": settings.workers}
    return {**workers, "batchSize": settings.batch_size, "maxBatchDelay": settings.max_batch_delay}
