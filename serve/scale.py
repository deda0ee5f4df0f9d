"""Change a model's number of workers, wait until it is true, and heal a model whose server gave it up."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from archive.mar import Archive
from archive.store import find_archives
from beeline.errors import BeelineError, Undetermined, did_you_mean
from serve import servers
from serve.client import READY, InferenceClient, ManagementClient, Model
from serve.config import ModelSettings, model_settings
from serve.instance import Instance, State
from serve.ready import Watch, try_golden
from serve.servers.protocol import Say, Server

_PAUSE = 0.2
# Seconds without any process that could become a worker, before a model counts as given up. Where other
# workers serve, the server's own next try (after 1, 1, 2, 3, 5, 8, 13 s) is awaited longer, because
# healing stops them too.
_GIVEN_UP = 3.0
_GIVEN_UP_PARTLY = 30.0
# Under load a golden picture waits in the queue like any other; only silence beyond that is a reason to heal.
_GOLDEN_PATIENCE = 60.0


@dataclass(frozen=True)
class Scaled:
    """What scaling came to: READY workers, whether it had to heal the model, seconds, the golden picture's answer."""

    model: str
    workers: int
    healed: bool
    seconds: float
    golden: str


@dataclass
class _Scaling:
    """One model of one server, while its number of workers changes."""

    kind: Server
    settings: ModelSettings
    low: int
    high: int
    management: ManagementClient
    watch: Watch
    patience: float
    told: bool = False

    @property
    def model(self) -> str:
        return self.settings.model

    def ask(self) -> None:
        """Send the request; where the server's answer tells, remember whether it came true."""
        wait = self.patience if self.kind.synchronous else None
        try:
            status = self.management.scale(self.model, self.low, self.high, wait)
        except BeelineError as error:
            if not self.kind.synchronous:
                raise
            raise type(error)(f"no worker of {self.model} stays up: {self.watch.why()} ({error})") from error
        self.told = not self.kind.synchronous or status == 200

    def settle(self) -> Model | None:
        """Wait until `low` to `high` workers are READY and there is no other; None when it was given up.

        A dead worker still counts for both servers: asking for as many as are dead does nothing, and
        requests hang. TorchServe answers 206 to that; in its list such a worker is not READY, and no
        process stands behind it. MMS lists it as READY, but answers 210 as long as it is dead.
        """
        deadline = time.monotonic() + self.patience
        begun, moved = self.watch.deaths, time.monotonic()
        while True:
            now = _described(self.management, self.model)
            if self.told and self.low <= now.ready == len(now.workers) <= self.high:
                return now
            children = self.watch.workers()
            if self.watch.deaths - begun > self.low:
                raise BeelineError(f"no worker of {self.model} stays up: {self.watch.why()}; see `beeline serve logs`")
            if self.kind.synchronous:
                serving = self.watch.forks() > 0
                self.ask()
            else:
                serving = now.ready > 0
                if children - self._serving() or now.ready > self.high:
                    moved = time.monotonic()
            if time.monotonic() - moved > (_GIVEN_UP_PARTLY if serving else _GIVEN_UP):
                return None
            if time.monotonic() > deadline:
                raise Undetermined(
                    f"{now.ready} of {self.low} workers of {self.model} are ready after {self.patience:g} s; "
                    "see `beeline serve logs`"
                )
            time.sleep(_PAUSE)

    def revive(self) -> None:
        """Start anew, whatever became of the old workers."""
        try:
            self.kind.revive(self.management, self.settings, self.low, self.high, self.patience)
        except BeelineError as error:
            raise type(error)(f"no worker of {self.model} stays up: {self.watch.why()} ({error})") from error
        self.watch.workers()
        self.told = True

    def _serving(self) -> set[int]:
        """Return the processes of READY workers of all models: what else Java runs is on its way."""
        described = (self.management.describe(name) for name in self.management.list())
        workers = (worker for found in described if found is not None for worker in found.workers)
        return {worker.pid for worker in workers if worker.pid is not None and worker.status == READY}


def scale(
    instance: Instance, state: State, model: str, low: int, high: int, say: Say, patience: float = 120.0
) -> Scaled:
    """Scale `model` to `low` to `high` workers and return when they are READY and answer.

    Neither server moves between the two by itself: `low` are started, more than `high` are stopped.

    Raises:
        BeelineError: for an unknown model, impossible numbers, or workers that do not stay up.
        Undetermined: when it does not come true within `patience` seconds.
    """
    # TorchServe forgets the workers that it keeps when the smaller number is 0 and the larger is not.
    if not 1 <= low <= high and not low == high == 0:
        raise BeelineError(f"--min is {low} and --max {high}; allowed: 1 or more with --max at least --min, or both 0")
    if state.java is None:
        raise BeelineError(f"the server {instance.name!r} is just starting; try again in a moment")
    began = time.monotonic()
    kind = servers.named(state.server)
    watch = Watch(state.java, instance.logs)
    settings = _settings(state, model)
    archive = _archive(state, settings)
    with ManagementClient(state.management) as management:
        scaling = _Scaling(kind, settings, low, high, management, watch, patience)
        watch.workers()
        before = management.describe(model)
        if kind.synchronous and low > 0 and not (before and before.workers):
            scaling.revive()
        else:
            scaling.ask()
        now, golden = _outcome(scaling, state, archive)
        healed = golden is None
        if healed:
            say(f"the server gave up on {model} ({watch.why()}); starting its workers anew")
            scaling.revive()
            now, golden = _outcome(scaling, state, archive)
    if now is None or golden is None:
        raise Undetermined(
            f"{model} does not answer with {low} workers, nor after starting them anew; "
            "see `beeline serve logs`, or start it again"
        )
    return Scaled(model, now.ready, healed, time.monotonic() - began, golden)


def _outcome(scaling: _Scaling, state: State, archive: Archive) -> tuple[Model | None, str | None]:
    """Return the settled model and what its golden picture showed; the latter None where only healing may help."""
    now = scaling.settle()
    if now is None:
        return None, None
    if scaling.low == 0:
        return now, "nothing to try without workers"
    try:
        with InferenceClient(state.backend, _GOLDEN_PATIENCE) as inference:
            return now, try_golden(inference, archive, None)
    except Undetermined:
        # READY, and no answer at all.
        return now, None


def _described(management: ManagementClient, model: str) -> Model:
    found = management.describe(model)
    if found is None:
        raise BeelineError(f"the server lost {model}; see `beeline serve logs`, or start it again")
    return found


def _settings(state: State, model: str) -> ModelSettings:
    """Return how the model was started; of several versions the default one, which requests and scaling mean."""
    started = [model_settings(values) for values in state.configuration["models"]]
    for settings in sorted(started, key=lambda each: not each.default_version):
        if settings.model == model:
            return settings
    hint = did_you_mean(model, {settings.model for settings in started})
    raise BeelineError(f"the server serves no model {model!r}{hint}")


def _archive(state: State, settings: ModelSettings) -> Archive:
    """Read the archive as it is served, which may have been built anew since."""
    store = Path(state.temporary) / "store"
    return find_archives(store, [settings.archive])[0]
