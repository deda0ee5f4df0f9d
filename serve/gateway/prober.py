"""True readiness: the server calls its workers READY, and golden pictures are answered as the archives expect.

Neither server's own `/ping` is enough: TorchServe says Healthy seconds before its first worker is ready, and while
workers crash again and again; MMS always answers 200.
"""

# ruff: noqa: D102 - an override is documented where it is declared

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
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
# Seconds between two golden pictures of a model that answers correctly: each costs a forward pass.
GOLDEN = 10.0
# A server that is too busy to describe its workers counts as unchanged for this long, in seconds.
_SILENCE = 15.0
_ANSWER = 5.0
_STUCK = 15.0


@dataclass(frozen=True)
class Seen:
    """What is known of one backend: `models` is `{name: {version: {"workers": n, "ready": n}}}`.

    A backend that is not ready may still take some predictions; `closed` names those that it refuses:
    `MODEL@VERSION`, and `MODEL@` for predictions without a version.
    """

    ready: bool
    reason: str
    models: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    closed: frozenset[str] = frozenset()

    @property
    def open(self) -> bool:
        """Whether predictions of some model are let through."""
        return self.ready or bool(self.closed)


class Watched(ABC):
    """One backend that a thread looks at again and again; `seen` is what the last look found.

    `calm` and `hasty` are the seconds between two looks at a backend that is ready, and at one that is not.
    """

    calm, hasty = 1.0, 0.5

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.seen = Seen(False, "starting")
        self._stop = threading.Event()

    @abstractmethod
    def look(self) -> Seen:
        """Ask the backend and return what is true now."""

    @abstractmethod
    def close(self) -> None:
        """Close the connections."""

    def start(self, changed: Callable[[], None]) -> None:
        """Start the thread; it calls `changed` whenever `seen` has changed."""
        name = f"watch {self.backend.inference}"
        threading.Thread(target=self._watch, args=(changed,), name=name, daemon=True).start()

    def stop(self) -> None:
        """End the thread after the look that is under way."""
        self._stop.set()

    def _watch(self, changed: Callable[[], None]) -> None:
        while not self._stop.is_set():
            before = self.seen
            try:
                self.seen = self.look()
            except Exception as error:
                # If the thread ended here, the last state would stay for ever.
                logger.exception("looking at %s failed", self.backend.inference)
                self.seen = Seen(False, f"the prober failed ({type(error).__name__}: {error}); see supervisor.log")
            if self.seen != before:
                changed()
            self._stop.wait(self.calm if self.seen.ready else self.hasty)
        self.close()


@dataclass
class _Golden:
    """The golden picture of one archive.

    Attributes:
        reason: why it is not answered correctly; None when it is.
        judged: when that was found out; all times are those of `time.monotonic`.
        correct: when it was last answered correctly.
        answer: of the picture that is under way, if there is one.
        sent: when that was sent.
        count: how many answers the workers had counted by then; None where nobody counts.
    """

    reason: str | None = "its golden picture is not answered yet"
    judged: float = float("-inf")
    correct: float = float("-inf")
    answer: Future[str] | None = None
    sent: float = 0.0
    count: int | None = None

    def judge(self, answer: Future[str], now: float, deadline: float) -> None:
        """Take the answer; a refusal by a full server is no failure within `deadline` seconds of a correct answer."""
        error = answer.exception()
        is_excused = isinstance(error, Busy) and now - self.correct < deadline
        self.reason = None if error is None or is_excused else str(error)
        self.correct = now if error is None else self.correct
        self.judged, self.answer = now, None


class Probe(Watched):
    """Asks a server for its workers, and for predictions of golden pictures.

    A golden picture waits in the server's queue like any other request, as long as a client may wait. So a server at
    its limit stays ready while its clients get answers; when nobody has got one for a while, the workers are stuck.
    """

    def __init__(self, backend: Backend, archives: Sequence[Archive], settings: Settings) -> None:
        super().__init__(backend)
        self.archives = archives
        self._settings = settings
        self._heard = time.monotonic()
        self._management = ManagementClient(backend.management, timeout=_ANSWER)
        self._goldens: dict[Archive, _Golden] = {}
        # Those under way, which a server that has ended since may never answer.
        self._running: list[Future[str]] = []

    def look(self) -> Seen:
        try:
            models, wrong = self._describe()
            self._heard = time.monotonic()
        except Undetermined as error:
            # A busy server is not dead: only a long silence or a refused connection says that it is.
            if isinstance(error.__cause__, requests.Timeout) and time.monotonic() - self._heard < _SILENCE:
                return self.seen
            self._goldens.clear()
            return Seen(False, f"the server does not answer ({error})")
        for archive in self.archives:
            if archive in wrong:
                # Earlier answers say nothing of the workers that will start.
                self._goldens.pop(archive, None)
            elif reason := self._try_golden(archive):
                wrong[archive] = f"{archive.model} {archive.version}: {reason}"
        failing = [archive for archive in self.archives if archive in wrong]
        return Seen(not wrong, wrong[failing[0]] if failing else "ready", models, self._closed(failing))

    def close(self) -> None:
        self._management.close()

    def _closed(self, failing: Sequence[Archive]) -> frozenset[str]:
        """Return the predictions to refuse; none where every archive fails, since nothing is let through then."""
        if len(failing) == len(self.archives):
            return frozenset()
        closed = {f"{one.model}@{one.version}" for one in failing}
        # Where the default version is unknown, a prediction without a version may reach any of them.
        defaults = self._settings.defaults
        return frozenset(
            closed | {f"{one.model}@" for one in failing if defaults.get(one.model) in (None, one.version)}
        )

    def _describe(self) -> tuple[dict[str, Any], dict[Archive, str]]:
        """Return the workers of every model, and by archive why it has none that is ready."""
        models: dict[str, Any] = {}
        missing: dict[Archive, str] = {}
        for archive in self.archives:
            version = archive.version if self._settings.versions else None
            described = self._management.describe(archive.model, version)
            workers = {"workers": 0, "ready": 0}
            if described is not None:
                workers = {"workers": described.min_workers, "ready": described.ready}
            models.setdefault(archive.model, {})[archive.version] = workers
            if described is None:
                missing[archive] = f"starting: {archive.model} {archive.version} is not loaded yet"
            elif described.ready == 0:
                missing[archive] = f"0 of {described.min_workers} workers of {archive.model} are ready"
        return models, missing

    def _try_golden(self, archive: Archive) -> str | None:
        """Send a golden picture when it is time; return why the last one was not answered correctly."""
        golden = self._goldens.setdefault(archive, _Golden())
        now = time.monotonic()
        if golden.answer is not None and golden.answer.done():
            golden.judge(golden.answer, now, self._settings.deadline)
        if golden.answer is None:
            if now - golden.judged > (GOLDEN if golden.reason is None else self.hasty):
                self._send(archive, golden, now)
        elif golden.count is not None and now - golden.sent > _STUCK and self._answers() == golden.count:
            return f"nobody has got an answer for {_STUCK:g} s, its golden picture neither"
        return golden.reason

    def _send(self, archive: Archive, golden: _Golden, now: float) -> None:
        """Send a golden picture in a thread, unless too many are under way."""
        self._running = [one for one in self._running if not one.done()]
        if len(self._running) < 4 * len(self.archives):
            golden.answer, golden.sent, golden.count = Future(), now, self._answers()
            self._running.append(golden.answer)
            # A daemon: a frozen worker must not hold up the gateway's end.
            threading.Thread(target=self._ask, args=(archive, golden.answer), name="golden", daemon=True).start()

    def _ask(self, archive: Archive, answer: Future[str]) -> None:
        version = archive.version if self._settings.versions else None
        try:
            with InferenceClient(self.backend.inference, timeout=self._settings.deadline, patience=0) as inference:
                answer.set_result(try_golden(inference, archive, version))
        except BeelineError as error:
            answer.set_exception(error)
        except Exception as error:
            logger.exception("a golden picture of %s cannot be sent", archive.model)
            answer.set_exception(error)

    def _answers(self) -> int | None:
        """Return how many answers the workers have counted; None where they run elsewhere or do not count."""
        answers = counts.answers(Path(self.backend.counts)) if self.backend.counts else None
        return None if answers is None else sum(sum(by_status.values()) for by_status in answers.values())


class Prober:
    """Watches backends; `changed` is called when what is known of one of them has changed."""

    def __init__(self, watched: Sequence[Watched], changed: Callable[[], None]) -> None:
        self._watched = watched
        self._changed = changed

    def start(self) -> None:
        """Start to watch."""
        for one in self._watched:
            one.start(self._changed)

    def stop(self) -> None:
        """Stop watching; a look that is under way ends by itself."""
        for one in self._watched:
            one.stop()

    def seen(self) -> list[Seen]:
        """Return what is known of every backend."""
        return [one.seen for one in self._watched]

    def backends(self) -> list[Backend]:
        """Return every backend, ready or not."""
        return [one.backend for one in self._watched]

    def members(self) -> list[str]:
        """Return the inference addresses of the backends that share the load."""
        watched = self._watched
        return [watched[index].backend.inference for index in fittest([one.seen for one in watched])]


def fittest(seen: Sequence[Seen]) -> list[int]:
    """Return which backends share the load: the ready ones, else those that let the same, largest part through."""
    closed = closed_together(seen)
    return [index for index, one in enumerate(seen) if one.open and one.closed == closed]


def closed_together(seen: Sequence[Seen]) -> frozenset[str]:
    """Return the predictions that none of the fittest backends takes."""
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
    # A gateway in front of this one lets through what is not named here.
    return {"status": "Unhealthy", "reason": reason, "models": models, **({"closed": closed} if closed else {})}
