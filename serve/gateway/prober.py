"""True readiness: workers READY by the server's word, and golden pictures answered as the archives expect.

Neither server's own `/ping` tells: TorchServe is Healthy seconds before its first worker is, and while
workers crash again and again; MMS always answers 200.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from beeline.errors import BeelineError, Undetermined
from serve.client import InferenceClient, ManagementClient
from serve.counts import load
from serve.gateway.settings import Backend, Settings
from serve.ready import Busy, try_canary
from serve.store import Archive

logger = logging.getLogger("prober")
# Seconds between two looks at a server that starts, and at one that is ready; and between two golden
# pictures of a model that answers. One costs a forward pass.
HASTY, CALM, CANARY = 0.5, 1.0, 10.0
# A server too busy to say how its workers are keeps what it was for this long, in seconds.
_SILENCE = 15.0
_ANSWER = 5.0
_STUCK = 15.0


@dataclass(frozen=True)
class Seen:
    """What is known of one backend: `models` is `{name: {version: {"workers": n, "ready": n}}}`."""

    ready: bool
    reason: str
    models: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)


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
    ) -> None:
        self.backend = backend
        self.archives = archives
        self.seen = Seen(False, "starting")
        self._versions = versions
        self._answered = answered
        self._heard = time.monotonic()
        self._management = ManagementClient(backend.management, timeout=_ANSWER)
        # Room for golden pictures that are stuck in a server beside those that ask it anew.
        self._pool = ThreadPoolExecutor(4 * len(archives), thread_name_prefix="canary")
        # Per archive: what was asked and when, and how many answers there had been by then.
        self._asked: dict[str, tuple[Future[str], float, int | None]] = {}
        # Per archive: why it does not answer rightly (None when it does), and when that was found out.
        self._canaries: dict[str, tuple[str | None, float]] = {}
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
            self._forget()
            self.seen = Seen(False, f"the server does not answer ({error})")
            return self.seen
        if missing:
            self._forget()
            self.seen = Seen(False, missing, models)
            return self.seen
        wrong = self._try_canaries()
        self.seen = Seen(not wrong, wrong or "ready", models)
        return self.seen

    def close(self) -> None:
        """Stop asking."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._management.close()

    def _forget(self) -> None:
        """Golden pictures of before tell nothing of the workers to come."""
        self._canaries.clear()
        self._asked.clear()
        self._good.clear()

    def _describe(self) -> tuple[dict[str, Any], str]:
        """Return the workers of every model, and what keeps the server from being ready."""
        models: dict[str, Any] = {}
        missing = ""
        for archive in self.archives:
            described = self._management.describe(archive.model, archive.version if self._versions else None)
            counts = {"workers": 0, "ready": 0}
            if described is not None:
                counts = {"workers": described.min_workers, "ready": described.ready}
            models.setdefault(archive.model, {})[archive.version] = counts
            if described is None:
                missing = missing or f"starting: {archive.model} {archive.version} is not loaded yet"
            elif described.ready == 0:
                missing = missing or f"0 of {described.min_workers} workers of {archive.model} are ready"
        return models, missing

    def _try_canaries(self) -> str:
        """Send golden pictures where it is time; return why one is not answered rightly, or nothing."""
        wrong = ""
        for archive in self.archives:
            key = archive.path.name
            now = time.monotonic()
            if key in self._asked and self._asked[key][0].done():
                self._canaries[key] = (self._outcome(key, self._asked.pop(key)[0]), now)
            reason, when = self._canaries.get(key, ("its golden picture is not answered yet", float("-inf")))
            if key not in self._asked and now - when > (CANARY if reason is None else HASTY):
                self._asked[key] = (self._pool.submit(self._ask, archive), now, self._answered())
            elif key in self._asked and self._stuck(*self._asked[key][1:]):
                reason = f"nobody has got an answer for {_STUCK:g} s, its golden picture neither"
            wrong = wrong or (f"{archive.model} {archive.version}: {reason}" if reason else "")
        return wrong

    def _ask(self, archive: Archive) -> str:
        with InferenceClient(self.backend.inference, timeout=self._deadline, patience=0) as inference:
            return try_canary(inference, archive, archive.version if self._versions else None)

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
        folder = settings.worker_metrics
        self.probes = [
            Probe(backend, archives, settings.versions, settings.deadline, functools.partial(_answers, folder))
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
        """Return the inference addresses of the ready backends."""
        return [probe.backend.inference for probe in self.probes if probe.seen.ready]

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
    workers = [] if folder is None else load(folder)
    return sum(sum(one.answers.values()) for one in workers) if workers else None


def together(seen: Sequence[Seen]) -> dict[str, Any]:
    """Return `/ping`'s answer for all backends: healthy when one of them is, workers added up."""
    models: dict[str, dict[str, dict[str, int]]] = {}
    for one in seen:
        for name, versions in one.models.items():
            for version, counts in versions.items():
                total = models.setdefault(name, {}).setdefault(version, {"workers": 0, "ready": 0})
                for key, count in counts.items():
                    total[key] += count
    if any(one.ready for one in seen):
        return {"status": "Healthy", "models": models}
    reason = "; ".join(dict.fromkeys(one.reason for one in seen)) or "no backend is there"
    return {"status": "Unhealthy", "reason": reason, "models": models}
