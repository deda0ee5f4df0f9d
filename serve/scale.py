"""Change a model's number of workers, wait until they are ready, and heal a model that its server has given up."""

from __future__ import annotations

import time
from dataclasses import dataclass

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
# A model counts as given up after this many seconds without any process that could become a worker. It is longer where
# other workers serve, for healing stops them too, and the server tries again by itself after 1, 1, 2, 3, 5, 8, 13 s.
_GIVEN_UP = 3.0
_GIVEN_UP_PARTLY = 30.0
# Under load a golden picture waits in the queue like any other; only a longer silence is a reason to heal.
_GOLDEN_PATIENCE = 60.0


@dataclass(frozen=True)
class Scaled:
    """The result: READY workers, whether the model had to be healed, seconds, the golden picture's answer."""

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
    # False while the server's last answer said that fewer workers run.
    is_done: bool = False

    @property
    def model(self) -> str:
        return self.settings.model

    def ask(self) -> None:
        """Send the request; where the server's answer says whether so many workers run, keep that."""
        wait = self.patience if self.kind.synchronous else None
        try:
            status = self.management.scale(self.model, self.low, self.high, wait)
        except BeelineError as error:
            if not self.kind.synchronous:
                raise
            raise type(error)(f"no worker of {self.model} stays up: {self.watch.why()} ({error})") from error
        self.is_done = not self.kind.synchronous or status == 200

    def settle(self) -> Model | None:
        """Wait until `low` to `high` workers are READY and there are no others; return None when the model is given up.

        Both servers count a dead worker too: to ask for as many as are dead does nothing, and requests hang.
        TorchServe answers 206 then; its list shows such a worker as not READY, and it has no process. MMS lists it as
        READY, but answers 210 as long as it is dead.
        """
        deadline = time.monotonic() + self.patience
        begun, moved = self.watch.deaths, time.monotonic()
        while True:
            now = _described(self.management, self.model)
            if self.is_done and self.low <= now.ready == len(now.workers) <= self.high:
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
        """Start new workers, whatever became of the old ones."""
        try:
            self.kind.revive(self.management, self.settings, self.low, self.high, self.patience)
        except BeelineError as error:
            raise type(error)(f"no worker of {self.model} stays up: {self.watch.why()} ({error})") from error
        self.watch.workers()
        self.is_done = True

    def _serving(self) -> set[int]:
        """Return the processes of READY workers of all models; Java's other children are starting."""
        described = (self.management.describe(name) for name in self.management.list())
        workers = (worker for found in described if found is not None for worker in found.workers)
        return {worker.pid for worker in workers if worker.pid is not None and worker.status == READY}


def scale(
    instance: Instance, state: State, model: str, low: int, high: int, say: Say, patience: float = 120.0
) -> Scaled:
    """Scale `model` to `low` to `high` workers and return when they are READY and answer.

    Neither server changes the number between the two by itself: it starts `low`, and stops those beyond `high`.

    Raises:
        BeelineError: for an unknown model, impossible numbers, or workers that do not stay up.
        Undetermined: when they are not ready within `patience` seconds.
    """
    # TorchServe keeps its workers, and forgets them, when only the smaller number is 0.
    if not 1 <= low <= high and not low == high == 0:
        raise BeelineError(f"--min is {low} and --max {high}; allowed: 1 or more with --max at least --min, or both 0")
    if state.java is None:
        raise BeelineError(f"the server {instance.name!r} is just starting; try again in a moment")
    began = time.monotonic()
    kind = servers.named(state.server)
    watch = Watch(state.java, instance.logs)
    settings = _settings(state, model)
    # The served copy: the archive may have been built again since.
    archive = find_archives(state.store, [settings.archive])[0]
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
            say(f"the server has given {model} up ({watch.why()}); starting new workers")
            scaling.revive()
            now, golden = _outcome(scaling, state, archive)
    if now is None or golden is None:
        raise Undetermined(
            f"{model} does not answer with {low} workers, and new workers do not answer either; "
            "see `beeline serve logs`, or start it again"
        )
    return Scaled(model, now.ready, healed, time.monotonic() - began, golden)


def _outcome(scaling: _Scaling, state: State, archive: Archive) -> tuple[Model | None, str | None]:
    """Return the settled model and its golden picture's result; the result is None where only healing may help."""
    now = scaling.settle()
    if now is None:
        return None, None
    if scaling.low == 0:
        return now, "nothing to try without workers"
    try:
        with InferenceClient(state.backend, _GOLDEN_PATIENCE) as inference:
            return now, try_golden(inference, archive, None)
    except Undetermined:
        # READY, but without any answer.
        return now, None


def _described(management: ManagementClient, model: str) -> Model:
    found = management.describe(model)
    if found is None:
        raise BeelineError(f"the server lost {model}; see `beeline serve logs`, or start it again")
    return found


def _settings(state: State, model: str) -> ModelSettings:
    """Return a model's settings; of several versions the default one, to which requests and scaling go."""
    started = [model_settings(values) for values in state.configuration["models"]]
    for settings in sorted(started, key=lambda each: not each.default_version):
        if settings.model == model:
            return settings
    hint = did_you_mean(model, {settings.model for settings in started})
    raise BeelineError(f"the server serves no model {model!r}{hint}")
