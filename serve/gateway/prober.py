"""True readiness: workers READY by the server's word, and golden pictures answered as the archives expect.

Neither server's own `/ping` tells: TorchServe is Healthy seconds before its first worker is, and while
workers crash again and again; MMS always answers 200.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from archive.mar import Archive
from beeline.errors import BeelineError, Undetermined
from serve import counts
from serve.client import InferenceClient, ManagementClient
from serve.gateway.settings import Backend, Settings
from serve.ready import Busy, try_golden

logger = logging.getLogger("prober")
# Seconds between two looks at a server that starts, and at one that is ready; and between two golden
# pictures of a model that answers. One costs a forward pass.
HASTY, CALM, GOLDEN = 0.5, 1.0, 10.0
# A server too busy to say how its workers are keeps what it was for this long, in seconds.
_SILENCE = 15.0
_ANSWER = 5.0
_STUCK = 15.0


@dataclass(frozen=True)
class Seen:
    """What is known of one backend: `models` is `{name: {version: {"workers": n, "ready": n}}}`.

    Where it is not ready and some predictions are let through all the same, `closed` names the others:
    `MODEL@VERSION`, and `MODEL@` for those that name no version.
    """

    ready: bool
    reason: str
    models: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    closed: frozenset[str] = frozenset()

    @property
    def open(self) -> bool:
        """Whether predictions of some model are let through."""
        return self.ready or bool(self.closed)


class Probe:
    """Watches one backend; `seen` is always what was true a moment ago.

    A golden picture waits in the server's queue like any other request. It is given as long as a client
    is, so a server at its limit stays ready as long as its clients get answers; `answered` counts those,
    and where nobody has got one for a while the worker is stuck.
    """

    def __init__(
        self,
        backend: Backend,
        archives: Sequence[Archive],
        versions: bool,
        deadline: float,
        answered: Callable[[], int | None] = lambda: None,
        defaults: Mapping[str, str] | None = None,
    ) -> None:
        self.backend = backend
        self.archives = archives
        self.seen = Seen(False, "starting")
        self._versions = versions
        self._defaults = defaults or {}
        self._answered = answered
        self._heard = time.monotonic()
        self._management = ManagementClient(backend.management, timeout=_ANSWER)
        # Golden pictures under way, those that are stuck in a server of before among them.
        self._running: list[Future[str]] = []
        # Per archive: what was asked and when, and how many answers there had been by then.
        self._asked: dict[str, tuple[Future[str], float, int | None]] = {}
        # Per archive: why it does not answer rightly (None when it does), and when that was found out.
        self._goldens: dict[str, tuple[str | None, float]] = {}
        self._good: dict[str, float] = {}
        self._deadline = deadline

    def look(self) -> Seen:
        """Ask the server and return what is known now."""
        try:
            models, missing = self._describe()
            self._heard = time.monotonic()
        except Undetermined as error:
            # Busy is not dead: only silence for long, or a refused connection, is.
            if isinstance(error.__cause__, requests.Timeout) and time.monotonic() - self._heard < _SILENCE:
                return self.seen
            for archive in self.archives:
                self._forget(archive.path.name)
            self.seen = Seen(False, f"the server does not answer ({error})")
            return self.seen
        for key in missing:
            self._forget(key)
        wrong = {**missing, **self._try_goldens([one for one in self.archives if one.path.name not in missing])}
        reason = next((wrong[one.path.name] for one in self.archives if one.path.name in wrong), "ready")
        self.seen = Seen(
            not wrong, reason, models, self._closed([one for one in self.archives if one.path.name in wrong])
        )
        return self.seen

    def close(self) -> None:
        """Stop asking; what is under way ends by itself."""
        self._management.close()

    def _forget(self, key: str) -> None:
        """Golden pictures of before tell nothing of the workers to come."""
        for known in (self._goldens, self._asked, self._good):
            known.pop(key, None)

    def _closed(self, wrong: Sequence[Archive]) -> frozenset[str]:
        """Return which predictions are to be refused for these; none where nothing is left, since all are then."""
        if len(wrong) == len(self.archives):
            return frozenset()
        closed = {f"{one.model}@{one.version}" for one in wrong}
        # Where nobody says which version answers a prediction that names none, it may be any.
        return frozenset(
            closed | {f"{one.model}@" for one in wrong if self._defaults.get(one.model) in (None, one.version)}
        )

    def _describe(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the workers of every model, and by archive what keeps it from being ready."""
        models: dict[str, Any] = {}
        missing: dict[str, str] = {}
        for archive in self.archives:
            described = self._management.describe(archive.model, archive.version if self._versions else None)
            workers = {"workers": 0, "ready": 0}
            if described is not None:
                workers = {"workers": described.min_workers, "ready": described.ready}
            models.setdefault(archive.model, {})[archive.version] = workers
            if described is None:
                missing[archive.path.name] = f"starting: {archive.model} {archive.version} is not loaded yet"
            elif described.ready == 0:
                missing[archive.path.name] = f"0 of {described.min_workers} workers of {archive.model} are ready"
        return models, missing

    def _try_goldens(self, archives: Sequence[Archive]) -> dict[str, str]:
        """Send golden pictures where it is time; return by archive why one is not answered rightly."""
        wrong: dict[str, str] = {}
        for archive in archives:
            key = archive.path.name
            now = time.monotonic()
            if key in self._asked and self._asked[key][0].done():
                self._goldens[key] = (self._outcome(key, self._asked.pop(key)[0]), now)
            reason, when = self._goldens.get(key, ("its golden picture is not answered yet", float("-inf")))
            if key not in self._asked and now - when > (GOLDEN if reason is None else HASTY):
                self._begin(archive, now)
            elif key in self._asked and self._stuck(*self._asked[key][1:]):
                reason = f"nobody has got an answer for {_STUCK:g} s, its golden picture neither"
            if reason:
                wrong[key] = f"{archive.model} {archive.version}: {reason}"
        return wrong

    def _begin(self, archive: Archive, now: float) -> None:
        """Send a golden picture in a thread, unless too many of before are not answered yet."""
        self._running = [one for one in self._running if not one.done()]
        if len(self._running) < 4 * len(self.archives):
            future: Future[str] = Future()
            self._running.append(future)
            self._asked[archive.path.name] = (future, now, self._answered())
            # A daemon: a frozen worker must not hold up the gateway's end.
            threading.Thread(target=self._ask, args=(archive, future), name="golden", daemon=True).start()

    def _ask(self, archive: Archive, future: Future[str]) -> None:
        try:
            with InferenceClient(self.backend.inference, timeout=self._deadline, patience=0) as inference:
                future.set_result(try_golden(inference, archive, archive.version if self._versions else None))
        except BeelineError as error:
            future.set_exception(error)
        except Exception as error:
            logger.exception("a golden picture of %s cannot be sent", archive.model)
            future.set_exception(error)

    def _stuck(self, since: float, before: int | None) -> bool:
        return before is not None and time.monotonic() - since > _STUCK and self._answered() == before

    def _outcome(self, key: str, done: Future[str]) -> str | None:
        """Return why a golden picture was not answered rightly, None when it was.

        One that was turned away says nothing: a full server is not one that fails, unless it goes on so.
        """
        try:
            done.result()
        except Busy as error:
            return None if time.monotonic() - self._good.get(key, float("-inf")) < self._deadline else str(error)
        except BeelineError as error:
            return str(error)
        self._good[key] = time.monotonic()
        return None


class Prober:
    """Watches every backend in a thread of its own, and tells when what is true of all of them changed."""

    def __init__(self, settings: Settings, archives: Sequence[Archive], changed: Callable[[], None]) -> None:
        self.probes = [
            Probe(
                backend,
                archives,
                settings.versions,
                settings.deadline,
                functools.partial(_answers, Path(backend.counts) if backend.counts else None),
                settings.defaults,
            )
            for backend in settings.backends
        ]
        self._changed = changed
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._watch, args=(probe,), name=f"probe {probe.backend.inference}", daemon=True)
            for probe in self.probes
        ]

    def start(self) -> None:
        """Start to watch."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop watching; what is under way ends by itself."""
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * _ANSWER)
        for probe in self.probes:
            probe.close()

    def seen(self) -> list[Seen]:
        """Return what is known of every backend."""
        return [probe.seen for probe in self.probes]

    def backends(self) -> list[Backend]:
        """Return every backend, ready or not."""
        return [probe.backend for probe in self.probes]

    def members(self) -> list[str]:
        """Return the inference addresses of the backends that share the load."""
        return [self.probes[index].backend.inference for index in fittest(self.seen())]

    def _watch(self, probe: Probe) -> None:
        while not self._stop.is_set():
            before = probe.seen
            try:
                probe.look()
            except Exception as error:
                # A thread that ended in silence would leave what was true then for ever.
                logger.exception("looking at %s failed", probe.backend.inference)
                probe.seen = Seen(False, f"the prober failed ({type(error).__name__}: {error}); see supervisor.log")
            if probe.seen != before:
                self._changed()
            self._stop.wait(CALM if probe.seen.ready else HASTY)


def _answers(folder: Path | None) -> int | None:
    """Return how many answers this machine's workers have counted.

    None where that is not known: they run elsewhere, or under somebody's own handler, which counts nothing.
    """
    known = None if folder is None else counts.answers(folder)
    return None if known is None else sum(sum(by_status.values()) for by_status in known.values())


def fittest(seen: Sequence[Seen]) -> list[int]:
    """Return which backends share the load: the ready ones, else those that let the most through, and the same."""
    closed = closed_together(seen)
    return [index for index, one in enumerate(seen) if one.open and one.closed == closed]


def closed_together(seen: Sequence[Seen]) -> frozenset[str]:
    """Return which predictions none of the fittest backends takes."""
    return min(
        (one.closed for one in seen if one.open), key=lambda closed: (len(closed), sorted(closed)), default=frozenset()
    )


def together(seen: Sequence[Seen]) -> dict[str, Any]:
    """Return `/ping`'s answer for all backends: healthy when one of them is, workers added up."""
    models: dict[str, dict[str, dict[str, int]]] = {}
    for one in seen:
        for name, versions in one.models.items():
            for version, workers in versions.items():
                total = models.setdefault(name, {}).setdefault(version, {"workers": 0, "ready": 0})
                for key, count in workers.items():
                    total[key] += count
    if any(one.ready for one in seen):
        return {"status": "Healthy", "models": models}
    reason = "; ".join(dict.fromkeys(one.reason for one in seen)) or "no backend is there"
    closed = sorted(closed_together(seen))
    # A gateway before this one lets through what is not named here.
    return {"status": "Unhealthy", "reason": reason, "models": models, **({"closed": closed} if closed else {})}
