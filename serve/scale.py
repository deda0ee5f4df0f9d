"""Change a model's number of workers, wait until they are ready, and heal a model that its server has given up.

`python -m serve.scale FOLDER` gives workers to each model of the instance's server that has lost all of them; it ends
with exit code 1 if one has not started.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from archive.mar import Archive
from archive.store import find_archives
from beeline.errors import BeelineError, Undetermined, did_you_mean
from host.files import locked, write_json
from serve import servers
from serve.client import READY, InferenceClient, ManagementClient, Model
from serve.config import ModelSettings, model_settings
from serve.instance import Instance, State, failures
from serve.ready import Watch, try_golden
from serve.servers.protocol import Say, Server

# A model counts as given up after this many seconds without any process that could become a worker. It is longer while
# other workers serve, since healing stops them too, and the server tries again by itself after 1, 1, 2, 3, 5, 8, 13 s.
_GIVEN_UP = 3.0
_GIVEN_UP_PARTLY = 30.0
# Under load a golden picture waits in the queue like any other; only a longer silence is a reason to heal.
_GOLDEN_PATIENCE = 60.0
logger = logging.getLogger("scale")


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
    # False if the server's last answer said that fewer workers run.
    is_done: bool = False

    def __post_init__(self) -> None:
        self.model, self.path = self.settings.model, self.kind.path(self.settings)

    def ask(self) -> None:
        """Send the request. Only MMS's answer says whether so many workers run."""
        if self.kind.synchronous:
            with self._reason():
                self.is_done = self.management.scale(self.path, self.low, self.high, self.patience) == 200
        else:
            self.management.scale(self.path, self.low, self.high)
            self.is_done = True

    def settle(self) -> Model | None:
        """Wait until `low` to `high` workers are READY and there are no others; return None if the model is given up.

        Both servers count a dead worker too: a request for as many as are dead does nothing, and predictions hang.
        TorchServe then answers 206; its list shows such a worker as not READY, and it has no process. MMS lists it as
        READY, but answers 210 as long as it is dead.
        """
        begun, moved, deaths = time.monotonic(), time.monotonic(), self.watch.deaths
        while True:
            now = self.management.describe(self.path)
            if now is None:
                raise BeelineError(f"the server lost {self.model}; see `beeline serve logs`, or start it again")
            if self.is_done and self.low <= now.ready == len(now.workers) <= self.high:
                return now
            children = self.watch.workers()
            if self.watch.deaths - deaths > self.low:
                raise BeelineError(f"no worker of {self.model} stays up: {self.watch.why()}; see `beeline serve logs`")
            if self.kind.synchronous:
                serving = self.watch.forks() > 0
                self.ask()
            else:
                serving = now.ready > 0
                serving_pids = {worker.pid for worker in now.workers if worker.status == READY}
                if children - serving_pids or now.ready > self.high:
                    moved = time.monotonic()
            if time.monotonic() - moved > (_GIVEN_UP_PARTLY if serving else _GIVEN_UP):
                return None
            if time.monotonic() - begun > self.patience:
                raise Undetermined(
                    f"{now.ready} of {self.low} workers of {self.model} are ready after {self.patience:g} s; "
                    "see `beeline serve logs`"
                )
            time.sleep(0.2)

    def revive(self) -> None:
        """Start new workers, whatever became of the old ones."""
        with self._reason():
            self.kind.revive(self.management, self.settings, self.low, self.high, self.patience)
        self.watch.workers()
        self.is_done = True

    def outcome(self, backend: str, archive: Archive) -> tuple[Model, str] | None:
        """Return the settled model and the golden picture's answer; None if only healing may help."""
        now = self.settle()
        if now is None:
            return None
        if self.low == 0:
            return now, "nothing to try without workers"
        # READY workers may give no answer at all.
        with suppress(Undetermined), InferenceClient(backend, _GOLDEN_PATIENCE) as inference:
            return now, try_golden(inference, archive, self.settings.version if self.kind.versions else None)
        return None

    @contextmanager
    def _reason(self) -> Iterator[None]:
        """Add the workers' own reason to the server's error."""
        try:
            yield
        except BeelineError as error:
            raise type(error)(f"no worker of {self.model} stays up: {self.watch.why()} ({error})") from error


def scale(
    instance: Instance, state: State, model: str, low: int, high: int, say: Say, patience: float = 120.0
) -> Scaled:
    """Scale `model`, or `model/version`, to `low` to `high` workers and return when they are READY and answer.

    Neither server changes the number between the two by itself: it starts `low`, and stops those beyond `high`.

    Raises:
        BeelineError: for an unknown model, impossible numbers, or workers that do not stay up.
        Undetermined: if they are not ready within `patience` seconds.
    """
    # TorchServe keeps its workers, and forgets them, if only the smaller number is 0.
    if not 1 <= low <= high and not low == high == 0:
        raise BeelineError(f"--min is {low} and --max {high}; allowed: 1 or more with --max at least --min, or both 0")
    if state.server_process is None:
        raise BeelineError(f"the server {instance.name!r} is just starting; try again in a moment")
    began = time.monotonic()
    kind = servers.named(state.server)
    settings = _settings(state, model)
    watch = Watch(state.server_process, instance.logs, settings.model, settings.version)
    # The served copy, because the archive may have been built again since.
    archive = find_archives(state.store, [settings.archive])[0]
    change = instance.audited(f"scale {model} to {low}-{high}")
    with change, ManagementClient(state.management) as management, locked(instance.scale_lock):
        scaling = _Scaling(kind, settings, low, high, management, watch, patience)
        watch.workers()
        before = management.describe(kind.path(settings))
        if kind.synchronous and low > 0 and not (before and before.workers):
            scaling.revive()
        else:
            scaling.ask()
        outcome = scaling.outcome(state.backend, archive)
        healed = outcome is None
        if healed:
            say(f"the server has given {model} up ({watch.why()}); starting new workers")
            scaling.revive()
            outcome = scaling.outcome(state.backend, archive)
        if outcome is None:
            raise Undetermined(
                f"{model} does not answer with {low} workers, and new workers do not answer either; "
                "see `beeline serve logs`, or start it again"
            )
        # From now on it is started again with the others.
        left_out = failures(instance.failed)
        if low > 0 and left_out.pop(f"{settings.model}/{settings.version}", None) is not None:
            write_json(instance.failed, left_out, mode=0o644)
    return Scaled(model, outcome[0].ready, healed, time.monotonic() - began, outcome[1])


def _settings(state: State, model: str) -> ModelSettings:
    """Return the settings of `model` or `model/version`; without a version those of the default one."""
    started = [model_settings(values) for values in state.configuration["models"]]
    for settings in sorted(started, key=lambda each: not each.default_version):
        if model in (settings.model, f"{settings.model}/{settings.version}"):
            return settings
    hint = did_you_mean(model, {settings.model for settings in started})
    raise BeelineError(f"the server serves no model {model!r}{hint}")


def restore(instance: Instance, state: State) -> bool:
    """Wait for the server, and give workers to each model without living ones; return whether all have started.

    The numbers are those that the server knows, else those of the start. Models that did not start then are left out;
    one that fails now is logged.
    """
    kind, left_out, has_started = servers.named(state.server), failures(instance.failed), True
    with ManagementClient(state.management) as management, locked(instance.scale_lock):
        # The supervisor ends this process together with the server.
        while management.unready() is not None:
            time.sleep(0.2)
        for settings in map(model_settings, state.configuration["models"]):
            path, patience = kind.path(settings), settings.startup_timeout.value
            until = time.monotonic() + patience
            try:
                now = management.describe(path)
                # After its start a patient server knows no model, so somebody has scaled this one to none.
                is_none = now is not None and kind.patient and not now.workers
                if is_none or f"{settings.model}/{settings.version}" in left_out:
                    continue
                watch = Watch(state.server_process or 0, instance.logs, settings.model, settings.version)
                if now is None or not now.workers:
                    kind.register(management, settings)
                elif kind.patient and watch.forks() == 0:  # It lists dead workers as READY.
                    kind.revive(management, settings, now.min_workers, now.max_workers, patience)
                while (now := management.describe(path)) is None or not now.ready:
                    if time.monotonic() > until:
                        raise Undetermined(f"no worker is ready after {patience} s")
                    time.sleep(0.2)
            except BeelineError as error:
                logger.error("%s %s does not start again: %s", settings.model, settings.version, error)
                has_started = False
    return has_started


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stdout)
    named = Instance(Path(sys.argv[1]))
    present = named.read()
    sys.exit(present is not None and not restore(named, present))
