"""Ready: every worker READY, and a golden picture answered as the archive expects; else a quick reason why not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

from archive.mar import MANIFEST, Archive
from beeline.errors import BeelineError, Undetermined
from host import machine
from serve.client import InferenceClient, ManagementClient
from serve.instance import logs


class Busy(BeelineError):
    """The server refused a golden picture because it holds as many requests as it can, or has lost its worker."""


class Watch:
    """Counts the deaths of one model's workers; both servers replace a dead worker and report nothing.

    `server` is its process's id, `folder` that of its logs. A worker runs in the folder of its unpacked archive.
    """

    def __init__(self, server: int, folder: Path, model: str, version: str) -> None:
        self.server = server
        self.folder = folder
        self.deaths = 0
        self.threads = logs.worker_threads(model, version)
        self._model = (model, version)
        self._alive: set[int] = set()
        self._killed = machine.oom_kills()

    def workers(self) -> set[int]:
        """Return the ids of this model's living workers, and count those that ended since the last call."""
        below = self._below()
        # Triton's are children of a child; what a worker has forked, as MMS's do, is in the same folder.
        children = {pid for pid, parent in below.items() if parent not in below}
        self.deaths += len(self._alive - children)
        self._alive = children
        return children

    def forks(self) -> int:
        """Return how many living processes the server's children have started: MMS's workers."""
        return sum(parent != self.server for parent in self._below().values())

    def _below(self) -> dict[int, int]:
        """Return the living processes below the server in this model's folder, each with its parent."""
        living = {}
        with suppress(psutil.Error):
            for child in psutil.Process(self.server).children(recursive=True):
                # One that just ended says nothing about the others.
                with suppress(psutil.Error, OSError, ValueError, KeyError):
                    folder = Path(child.cwd()) if child.status() != psutil.STATUS_ZOMBIE else None
                    if folder is not None and model_in(folder) == self._model:
                        living[child.pid] = child.ppid()
        return living

    def why(self, patience: float = 5.0) -> str:
        """Return the log's reason for a worker's death.

        A worker's own reason may reach the log seconds after the server's; wait up to `patience` seconds for it.
        """
        deadline = time.monotonic() + patience
        while logs.worker_failure(self.folder, self.threads) is None and time.monotonic() < deadline:
            if killed := machine.oom_kills() - self._killed:
                return f"the kernel killed {killed} processes of this cgroup for memory: start fewer (--workers)"
            time.sleep(0.1)
        return logs.failure(self.folder, self.threads) or "it logged no reason, as when memory runs out"


@cache
def model_in(folder: Path) -> tuple[str, str]:
    """Return the name and the version in the manifest of an unpacked archive; the version defaults as in `mar.read`."""
    model = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["model"]
    return str(model["modelName"]), str(model.get("modelVersion", "1.0"))


def wait_for_workers(
    management: ManagementClient,
    model: str,
    version: str | None,
    wanted: int,
    watch: Watch,
    seconds: float,
    check: Callable[[], None],
    fix: Callable[[str], str],
) -> None:
    """Wait until `wanted` workers of the model are READY and the server lists no others.

    `version` None means the default one. `watch` is made before the workers start; `check` raises if the server ended.
    `fix` returns what helps against the reason of a worker's death. Raise BeelineError if workers die again and again,
    and Undetermined after `seconds`.
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
            return
        # One death may be an accident; more deaths than workers are not. A refusal is final.
        has_refused = watch.deaths > begun and logs.refusal(watch.folder, watch.threads) is not None
        if has_refused or watch.deaths - begun > max(wanted, 1):
            why = watch.why()
            raise BeelineError(f"no worker of {model} stays up: {why}; {fix(why)}")
        if time.monotonic() > deadline:
            raise Undetermined(
                f"{described.ready} of {wanted} workers of {model} are ready after {seconds:g} s; "
                f"see {watch.folder}, or raise startupTimeout"
            )
        time.sleep(0.2)


def try_golden(inference: InferenceClient, archive: Archive, version: str | None) -> str:
    """Send the archive's golden picture and compare the first label; return a sentence on the result.

    Raise Busy for an answer of 429 or 503, and BeelineError if it is not 200 with the expected label.
    """
    if archive.golden is None:
        return f"{archive.model}: workers are READY; the archive has no golden picture to try"
    answer = inference.predict(archive.model, archive.golden_bytes(), version)
    if answer.status != 200:
        # Without a handler's headers, an error means that the picture's worker has died.
        has_died = answer.status in (500, 507) and "x-batch-size" not in map(str.lower, answer.headers)
        raise (Busy if answer.status in (429, 503) or has_died else BeelineError)(
            f"{archive.model} answers its golden picture {archive.golden.file} with {answer.status} "
            f"({answer.body.strip()[:200]}); see `beeline serve logs`"
        )
    try:
        scores = dict(answer.json())
        is_text = isinstance(scores.get("caption"), str)
        label = scores["caption"] if is_text else max(scores, key=lambda name: float(scores[name]))
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
