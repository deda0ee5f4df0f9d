"""Ready: every worker READY, and a golden picture answered as the archive expects; or quickly why not."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil

from archive.mar import Archive
from beeline.errors import BeelineError, Undetermined
from serve.client import InferenceClient, ManagementClient, Model
from serve.instance import logs

_PAUSE = 0.2
_LOG_PATIENCE = 5.0


class Busy(BeelineError):
    """The server turned a golden picture away because it holds as many requests as it can."""


class Watch:
    """Counts the deaths of a server's workers, which neither server tells: each starts a new one in silence."""

    def __init__(self, java: int, folder: Path) -> None:
        self.java = java
        self.folder = folder
        self.deaths = 0
        self._alive: set[int] = set()

    def workers(self) -> set[int]:
        """Return the ids of Java's living children, and count those that are gone since the last call."""
        try:
            children = {
                child.pid for child in psutil.Process(self.java).children() if child.status() != psutil.STATUS_ZOMBIE
            }
        except psutil.Error:
            children = set()
        self.deaths += len(self._alive - children)
        self._alive = children
        return children

    def forks(self) -> int:
        """Return how many living processes Java's children have started: MMS's workers."""
        try:
            below = psutil.Process(self.java).children(recursive=True)
            alive = [each for each in below if each.status() != psutil.STATUS_ZOMBIE]
            return sum(each.ppid() != self.java for each in alive)
        except psutil.Error:
            # One of them ended in this instant; the next look tells.
            return 0

    def why(self) -> str:
        """Return the reason for a worker's death, as far as the log tells.

        What a worker said may reach its log a moment after the server's own complaint.
        """
        deadline = time.monotonic() + _LOG_PATIENCE
        while logs.worker_failure(self.folder) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return logs.failure(self.folder) or "it ended without a word, as when memory runs out"


def wait_for_workers(
    management: ManagementClient,
    model: str,
    version: str | None,
    wanted: int,
    watch: Watch,
    seconds: float,
    check: Callable[[], None] = lambda: None,
) -> Model:
    """Wait until `wanted` workers of the model are READY and no other is in the list.

    Args:
        management: the server's.
        model: its name.
        version: None for the default one.
        wanted: workers.
        watch: started before the workers were.
        seconds: at most.
        check: raises when there is nothing to wait for any more.

    Raises:
        BeelineError: when its workers die again and again, with the log's reason.
        Undetermined: when time is up.
    """
    deadline = time.monotonic() + seconds
    begun = watch.deaths
    while True:
        check()
        described = management.describe(model, version)
        if described is None:
            raise BeelineError(
                f"the server could not load {model}: {logs.failure(watch.folder) or 'no reason logged'}; "
                "verify its archive with `beeline archive verify`"
            )
        watch.workers()
        if described.ready >= wanted and described.ready == len(described.workers):
            return described
        # One death may be an accident, one more than workers is none; a refusal is for good.
        refused = watch.deaths > begun and "refuses to serve" in _recent(watch.folder)
        if refused or watch.deaths - begun > max(wanted, 1):
            raise BeelineError(
                f"no worker of {model} stays up: {watch.why()}; see `beeline serve logs`, "
                "or run the archive alone with `beeline archive run`"
            )
        if time.monotonic() > deadline:
            raise Undetermined(
                f"{described.ready} of {wanted} workers of {model} are ready after {seconds:g} s; "
                f"see {watch.folder}, or raise startupTimeout"
            )
        time.sleep(_PAUSE)


def try_golden(inference: InferenceClient, archive: Archive, version: str | None) -> str:
    """Send the archive's golden picture and compare the first label; return a sentence on what was seen.

    Raises:
        BeelineError: when it is not answered 200 with the expected label.
    """
    if archive.golden is None:
        return f"{archive.model}: workers are READY; the archive brings no golden picture to try"
    answer = inference.predict(archive.model, archive.golden_bytes(), version)
    if answer.status != 200:
        raise (Busy if answer.status in (429, 503) else BeelineError)(
            f"{archive.model} answers its golden picture {archive.golden.file} with {answer.status} "
            f"({answer.body.strip()[:200]}); see `beeline serve logs`"
        )
    try:
        scores = answer.json()
        if not isinstance(scores, dict):
            raise TypeError(f"{type(scores).__name__} in place of an object")
        label = max(scores, key=lambda name: float(scores[name]))
    except (ValueError, TypeError) as error:
        raise BeelineError(
            f"{archive.model} answers its golden picture with {answer.body[:200]!r}, which names no label; "
            "build the archive with Beeline's own handler"
        ) from error
    if label != archive.golden.label:
        raise BeelineError(
            f"{archive.model} answers its golden picture {archive.golden.file} {label!r}, "
            f"the archive expects {archive.golden.label!r}; build it again"
        )
    return f"{archive.model}: golden picture {archive.golden.file} answered {label!r}, as expected"


def _recent(folder: Path) -> str:
    path = folder / "worker.log"
    return "\n".join(logs.tail(path, 200)) if path.is_file() else ""
