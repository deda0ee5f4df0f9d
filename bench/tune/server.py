"""What a tuning measures: batches in a sandbox, and real servers that serve one archive under several names."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import javaproperties

from archive import mar, store
from archive.mar import Archive
from archive.sandbox import OutOfMemory, Sandbox
from bench.load import Plan, run
from bench.pictures import Pictures
from bench.record import Journal
from bench.tune.grid import WORKERS, Goal, Settings, Turn
from host import machine
from host.files import sha256
from serve import properties
from serve.addresses import Ports
from serve.config import LONE, Overrides, resolve
from serve.instance.child import Running
from serve.properties import Properties
from serve.servers.protocol import MALLOC
from serve.up import Request, up

# At most so many pictures of a folder are sent; batches are timed with the first of them.
MOST_PICTURES, _TIMED = 200, 32
_SIZES = (1, 2, 4, 8, 16, 32)
# Seconds of Java's own start; workers that start together slow each other down.
_JAVA_SECONDS, _CROWDED = 4.0, 1.3
_OF_MEMORY, _SETTLE_SECONDS, _STARTUP_SECONDS, _LOAD_SECONDS = 0.8, 30.0, 600, 180.0
# A request has failed after six budgets, but not before so many seconds.
_DEADLINE = 10.0


@dataclass(frozen=True)
class Model:
    """An archive, its file's sha256, the configuration under the environment, and its settings for the archive."""

    archive: Archive
    sha256: str
    properties: Properties
    configured: Settings


def find_model(name: str, folder: Path, config_file: Path, environ: Mapping[str, str]) -> Model:
    """Return the model of an archive, by path or name in the store; raise `BeelineError` if it cannot be served."""
    archive = store.find_archives(folder, (str(Path(name).resolve()) if Path(name).is_file() else name,))[0]
    mar.check(archive.path)
    numbers = properties.load(config_file, environ)
    return Model(archive, sha256(archive.path), numbers, configured(archive, numbers, environ, Overrides()))


def configured(archive: Archive, numbers: Properties, environ: Mapping[str, str], overrides: Overrides) -> Settings:
    """Return the settings with which `serve up` would serve an archive; it raises the same."""
    gpus = 0 if environ.get("BEELINE_DEVICE") == "cpu" else len(machine.gpus())
    resolved = resolve(numbers, (archive,), overrides, environ, machine.cores(), gpus, machine.free_memory())
    (model,) = resolved.models
    values = (model.batch_size, model.min_workers, model.max_batch_delay, resolved.threads)
    return Settings(*(setting.value for setting in values))


@dataclass
class Servers(ExitStack):
    """Real servers, one for each number of threads at each `open`; a context manager that stops them all.

    Neither server changes a model's batch size or delay while it runs, and TorchServe then takes no other model. So
    each configuration is the archive under a name of its own, and a turn of one can follow a turn of another at once:
    workers without requests take memory and no processor time.
    """

    model: Model
    goal: Goal
    pictures: Pictures
    server: str
    journal: Journal
    running: dict[Settings, Running] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._most_workers, self._start_seconds = WORKERS[-1], 0.0

    def open(self, configurations: Sequence[Settings]) -> None:
        """Start what does not run yet and wait for answers; where memory is short, stop what runs first."""
        if sum(settings.workers for settings in {*self.running, *configurations}) > self._most_workers:
            self.stop()
        missing = sorted(set(configurations) - set(self.running), key=lambda each: each.threads)
        for _, group in itertools.groupby(missing, lambda each: each.threads):
            self._start(list(group))

    def run(self, settings: Settings, seconds: float, warm_up: float) -> Turn:
        """Make the load on one configuration and return its turn."""
        running, goal = self.running[settings], self.goal
        running.check()
        url, clients = f"{running.state.backend}/predictions/{settings.label}", None if goal.rate else goal.clients
        deadline = max(_DEADLINE, 6 * (goal.p95_ms or 0.0) / 1000)
        figures = run(Plan(url, self.pictures, seconds, warm_up, clients, goal.rate, deadline=deadline)).summary()
        if figures["failed"]:
            # The next turn waits until the server has answered the requests that its clients gave up.
            run(Plan(url, self.pictures, seconds=0.1, warm_up=0.0, clients=1, deadline=_SETTLE_SECONDS))
        per_second, p95_ms, backlog = figures["good_per_second"], figures["p95_ms"], figures["backlog"]
        cost, growing = goal.cost(per_second, p95_ms), bool(backlog and backlog["growing"])
        return Turn(settings, figures["seconds"], per_second, p95_ms, figures["failed"], cost, growing)

    def time_batches(self, threads: int, seconds: float) -> None:
        """Time batches in a sandbox; add rows `batch` (threads, size, ms) and `cost`, as by `Sandbox.time_batches`."""
        names = ("OMP_NUM_THREADS", "BEELINE_THREADS", "BEELINE_LONE_THREADS")
        # A worker may hold a second model for a picture that comes alone, and that costs memory.
        lone = self.model.properties.numbers.get("beeline_lone_threads") or min(machine.cores(), LONE)
        environment = MALLOC | dict.fromkeys(names, str(threads))
        with Sandbox(self.model.archive.path, load_seconds=_LOAD_SECONDS, environment=environment) as sandbox:
            sandbox.take(self.pictures.bodies[:_TIMED])
            try:
                for reply in sandbox.time_batches(_SIZES, seconds, lone):
                    if "batch" in reply:
                        self.journal.add("batch", [threads, reply["batch"], reply["ms"]])
                    else:
                        self.journal.add("cost", reply["cost"])
            except OutOfMemory:
                if not self.journal.of("batch"):
                    raise

    def opening_seconds(self, configurations: Sequence[Settings]) -> float:
        """Return about how many seconds opening them will take, by the last time."""
        each = self._start_seconds or _CROWDED * self._cost()["load_seconds"] / machine.cores()
        groups = len({settings.threads for settings in configurations})
        return _JAVA_SECONDS * groups + each * sum(settings.workers for settings in configurations)

    def room(self) -> int:
        """Return how many workers fit into memory; from now on no more run at a time."""
        cost = self._cost()
        rooms = [WORKERS[-1], int(_OF_MEMORY * machine.free_memory() / cost["memory"])]
        if cost.get("device_memory"):
            rooms.append(int(_OF_MEMORY * cost["device_free"] / cost["device_memory"]))
        self._most_workers = max(1, min(rooms))
        return self._most_workers

    def _cost(self) -> dict[str, float]:
        return {"memory": 1 << 30, "load_seconds": 6.0} | next(iter(self.journal.of("cost")[-1:]), {})

    def stop(self) -> None:
        """Stop every server."""
        self.running.clear()
        self.close()

    def _start(self, configurations: Sequence[Settings]) -> None:
        began, workers = time.monotonic(), sum(settings.workers for settings in configurations)
        folder = Path(self.enter_context(tempfile.TemporaryDirectory(prefix="beeline-tune-")))
        archives = tuple(str(mar.renamed(self.model.archive.path, each.label, folder)) for each in configurations)
        numbers = configuration(self.model, configurations, folder)
        request = Request(self.server, archives, folder, numbers, "tune", ports=Ports(0), gateway="none")
        # The configuration has the values of these already.
        own = {*properties.VARIABLES, "BATCH_SIZE", "WORKERS", "LINGER_MS"}
        environ = {name: value for name, value in os.environ.items() if name not in own}
        running = self.enter_context(up(request, lambda line: None, {**environ, "BEELINE_STATE": str(folder)}))
        self.running |= dict.fromkeys(configurations, running)
        self._start_seconds = max(0.1, (time.monotonic() - began - _JAVA_SECONDS) / workers)


def configuration(model: Model, configurations: Sequence[Settings], folder: Path) -> Path:
    """Write the configured numbers into a folder, with a model for each of these settings."""
    version, startup = model.archive.version, {"startupTimeout": _STARTUP_SECONDS}
    entries = {each.label: {version: numbers_of(each) | startup} for each in configurations}
    values = {key: str(value) for key, value in model.properties.numbers.items()}
    values |= {"vmargs": model.properties.texts["vmargs"]} if "vmargs" in model.properties.texts else {}
    values |= {"beeline_threads": str(configurations[0].threads), "models": json.dumps(entries)}
    path = folder / "config.properties"
    path.write_text(javaproperties.dumps(values, timestamp=False), encoding="utf-8")
    return path


def numbers_of(settings: Settings) -> dict[str, int]:
    """Return a model's numbers with the keys of `models`."""
    workers = {"minWorkers": settings.workers, "maxWorkers": settings.workers}
    return {**workers, "batchSize": settings.batch_size, "maxBatchDelay": settings.max_batch_delay}
