"""True readiness: the server calls its workers READY, and answers golden pictures as their archives expect.

The servers' own `/ping` is not enough: TorchServe says Healthy seconds before its first worker is ready, and while
workers crash again and again; MMS always answers 200.
"""

# ruff: noqa: D102 - an override is documented where it is declared

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from archive.mar import Archive
from beeline.errors import BeelineError, Undetermined
from serve import counts
from serve.client import InferenceClient, ManagementClient
from serve.gateway.settings import Backend, Settings
from serve.instance import failures
from serve.ready import Busy, try_golden

logger = logging.getLogger("prober")
# All in seconds. Between two golden pictures of a model that answers correctly, since each costs a forward pass.
_GOLDEN = 10.0
# A server that is too busy to describe its workers counts as unchanged for so long.
_SILENCE = 15.0
_ANSWER = 5.0
# Describing one model costs the gateway and Java about 3 ms of CPU time, so many models are looked at less often.
_PER_MODEL = 0.1
# Workers that have answered nobody for so long are stuck.
_STUCK = 15.0


@dataclass(frozen=True)
class Seen:
    """The state of one backend; `models` is `{name: {version: {"workers": n, "ready": n}}}`.

    `closed` names the predictions that it refuses while it takes others: `MODEL@VERSION`, and `MODEL@` for those
    without a version. A backend that is not ready may have some, and a ready one those of the models that did not
    start; `failed` says why, by `MODEL/VERSION`.
    """

    ready: bool
    reason: str
    models: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    closed: frozenset[str] = frozenset()
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def open(self) -> bool:
        """Whether it takes predictions of some model."""
        return self.ready or bool(self.closed)


class Watched(ABC):
    """One backend, which a thread asks for its state again and again; `seen` is its last state.

    `calm` and `hasty` are the seconds between two looks: while the backend is ready, and while it is not.
    """

    calm, hasty = 1.0, 0.5

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.seen = Seen(False, "starting")
        self._stop = threading.Event()

    @abstractmethod
    def look(self) -> Seen:
        """Ask the backend and return its state."""

    @abstractmethod
    def close(self) -> None: ...

    def start(self, changed: Callable[[], None]) -> None:
        """Start the thread; it calls `changed` whenever `seen` has changed."""
        name = f"watch {self.backend.inference}"
        threading.Thread(target=self._watch, args=(changed,), name=name, daemon=True).start()

    def stop(self) -> None:
        """Let the thread end after the look that is under way."""
        self._stop.set()

    def _watch(self, changed: Callable[[], None]) -> None:
        while not self._stop.is_set():
            before = self.seen
            try:
                self.seen = self.look()
            except Exception as error:
                # Without a thread the last state would stay for ever.
                logger.exception("looking at %s failed", self.backend.inference)
                self.seen = Seen(False, f"the prober failed ({type(error).__name__}: {error}); see supervisor.log")
            if self.seen != before:
                changed()
            self._stop.wait(self.calm if self.seen.ready else self.hasty)
        self.close()


@dataclass
class _Golden:
    """The golden picture of one archive; all times are those of `time.monotonic`."""

    reason: str | None = "its golden picture is not answered yet"  # None when the last answer was correct
    judged: float = float("-inf")  # when `reason` was set
    correct: float = float("-inf")  # when the last correct answer came
    sent: float | None = None  # when the picture that is under way was sent
    count: int | None = None  # answers that the workers had counted by then; None where nobody counts

    def judge(self, error: Exception | None, deadline: float) -> None:
        """Judge the answer; for `deadline` seconds after a correct one, the refusal of a full server is no failure."""
        now = time.monotonic()
        is_excused = isinstance(error, Busy) and now - self.correct < deadline
        self.reason = None if error is None or is_excused else str(error) or type(error).__name__
        self.correct = now if error is None else self.correct
        self.judged, self.sent = now, None


class Probe(Watched):
    """Asks a server for its workers, and for predictions of golden pictures.

    A golden picture waits in the server's queue like any other request. So a server at its limit stays ready as long as
    its clients get answers.
    """

    def __init__(self, backend: Backend, archives: Sequence[Archive], settings: Settings) -> None:
        super().__init__(backend)
        self.archives = archives
        self.calm = max(self.calm, _PER_MODEL * len(archives))
        self._settings = settings
        self._heard = time.monotonic()
        self._management = ManagementClient(backend.management, timeout=_ANSWER)
        self._goldens: dict[Archive, _Golden] = {}
        self._workers: dict[Archive, int] = {}
        # Each waits for the answer to a golden picture, which a server that has ended may never give.
        self._threads: list[threading.Thread] = []

    def look(self) -> Seen:
        try:
            models, wrong = self._describe()
            self._heard = time.monotonic()
        except Undetermined as error:
            # A busy server is not dead; a long silence or a refused connection means that it is.
            if isinstance(error.__cause__, requests.Timeout) and time.monotonic() - self._heard < _SILENCE:
                return self.seen
            self._goldens.clear()
            return Seen(False, f"the server does not answer ({error})")
        for archive in self.archives:
            if archive in wrong:
                # Earlier answers say nothing about the workers that will start.
                self._goldens.pop(archive, None)
            elif reason := self._try_golden(archive):
                wrong[archive] = f"{archive.model} {archive.version}: {reason}"
        failing = [archive for archive in self.archives if archive in wrong]
        names = {archive: f"{archive.model}/{archive.version}" for archive in failing}
        given_up = failures(self.backend.failed) if failing and self.backend.failed else {}
        # What did not start makes nobody wait, unless nothing else is there.
        waited = [archive for archive in failing if names[archive] not in given_up]
        is_ready = not waited and len(failing) < len(self.archives)
        reason = wrong[(waited or failing)[0]] if failing else "ready"
        failed = {name: given_up[name] for name in names.values() if name in given_up}
        return Seen(is_ready, reason, models, self._closed(failing), failed)

    def close(self) -> None:
        self._management.close()

    def _closed(self, failing: Sequence[Archive]) -> frozenset[str]:
        """Return the predictions to refuse; none where every archive fails, since the gateway is closed then."""
        if len(failing) == len(self.archives):
            return frozenset()
        defaults = self._settings.defaults
        # Where the default version is unknown, a prediction without a version may reach any of them.
        unnamed = {f"{one.model}@" for one in failing if defaults.get(one.model) in (None, one.version)}
        return frozenset(unnamed | {f"{one.model}@{one.version}" for one in failing})

    def _describe(self) -> tuple[dict[str, Any], dict[Archive, str]]:
        """Return the workers of every model, and for each archive without a ready worker the reason."""
        models: dict[str, Any] = {}
        missing: dict[Archive, str] = {}
        for archive in self.archives:
            described = self._management.describe(archive.model, self._version(archive))
            # Nobody has asked for fewer while a server that has restarted does not know the model yet.
            before = self._workers.get(archive, 0)
            workers, ready = (before, 0) if described is None else (described.min_workers, described.ready)
            self._workers[archive] = workers
            models.setdefault(archive.model, {})[archive.version] = {"workers": workers, "ready": ready}
            if described is None:
                missing[archive] = f"starting: {archive.model} {archive.version} is not loaded yet"
            elif ready == 0:
                missing[archive] = f"0 of {workers} workers of {archive.model} are ready"
        return models, missing

    def _try_golden(self, archive: Archive) -> str | None:
        """Send a golden picture when it is time; return what was wrong with the last answer."""
        golden = self._goldens.setdefault(archive, _Golden())
        now, sent = time.monotonic(), golden.sent
        if sent is None:
            if now - golden.judged > (_GOLDEN if golden.reason is None else self.hasty):
                self._send(archive, golden)
        elif golden.count is not None and now - sent > _STUCK and self._answers() == golden.count:
            return f"nobody has got an answer for {_STUCK:g} s, its golden picture neither"
        return golden.reason

    def _send(self, archive: Archive, golden: _Golden) -> None:
        """Send a golden picture in a thread, unless too many are under way."""
        self._threads = [one for one in self._threads if one.is_alive()]
        if len(self._threads) < 4 * len(self.archives):
            golden.sent, golden.count = time.monotonic(), self._answers()
            # A daemon, because a frozen worker must not delay the gateway's end.
            thread = threading.Thread(target=self._ask, args=(archive, golden), name="golden", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _ask(self, archive: Archive, golden: _Golden) -> None:
        problem: Exception | None = None
        try:
            with InferenceClient(self.backend.inference, timeout=self._settings.deadline, patience=0) as inference:
                try_golden(inference, archive, self._version(archive))
        except Exception as error:
            problem = error
            if not isinstance(error, BeelineError):
                logger.exception("a golden picture of %s cannot be sent", archive.model)
        golden.judge(problem, self._settings.deadline)

    def _version(self, archive: Archive) -> str | None:
        """Return the version to ask for; None where the server has only one of each model."""
        return archive.version if self._settings.versions else None

    def _answers(self) -> int | None:
        """Return how many answers the workers have counted; None where they run elsewhere or do not count."""
        answers = counts.answers(Path(self.backend.counts)) if self.backend.counts else None
        return None if answers is None else sum(sum(by_status.values()) for by_status in answers.values())


class Prober:
    """Watches backends, and calls `changed` when the state of one of them has changed."""

    def __init__(self, watched: Sequence[Watched], changed: Callable[[], None]) -> None:
        self.watched = watched
        self._changed = changed

    def start(self) -> None:
        for one in self.watched:
            one.start(self._changed)

    def stop(self) -> None:
        for one in self.watched:
            one.stop()

    def seen(self) -> list[Seen]:
        """Return the state of every backend."""
        return [one.seen for one in self.watched]

    def members(self) -> list[str]:
        """Return the inference URLs of the backends that share the load.

        They are those that refuse the same, smallest part of the predictions: mostly none.
        """
        states = [(one.backend.inference, one.seen) for one in self.watched]
        closed = closed_together([seen for _, seen in states])
        return [url for url, seen in states if seen.open and seen.closed == closed]


def closed_together(seen: Sequence[Seen]) -> frozenset[str]:
    """Return the predictions that the backends refuse that share the load."""
    choices = (one.closed for one in seen if one.open)
    return min(choices, key=lambda closed: (len(closed), sorted(closed)), default=frozenset())


def together(seen: Sequence[Seen]) -> dict[str, Any]:
    """Return `/ping`'s answer for all backends: healthy when one of them is ready, with the sum of their workers."""
    models: dict[str, dict[str, dict[str, int]]] = {}
    for one in seen:
        for name, versions in one.models.items():
            for version, workers in versions.items():
                total = models.setdefault(name, {}).setdefault(version, {"workers": 0, "ready": 0})
                for key, count in workers.items():
                    total[key] += count
    closed = closed_together(seen)
    failed = {name: reason for one in seen if one.closed == closed for name, reason in one.failed.items()}
    # A gateway in front of this one lets pass what `closed` does not name.
    parts = {"closed": sorted(closed), "failed": failed}
    values = {"models": models, **{name: part for name, part in parts.items() if part}}
    if any(one.ready for one in seen):
        return {"status": "Healthy", **values}
    reason = "; ".join(dict.fromkeys(one.reason for one in seen)) or "no backend is there"
    return {"status": "Unhealthy", "reason": reason, **values}
