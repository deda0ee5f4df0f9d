"""The gateway process: nginx, which listens in public, the prober behind `/ping`, and the exporter of `/metrics`.

Run as `python -m serve.gateway FOLDER`, the runtime folder that `serve.gateway.runtime` made. It ends on
SIGTERM: unready first, then what is on its way is answered.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from archive import store
from beeline.errors import BeelineError
from serve import metrics
from serve.gateway import catalog, runtime
from serve.gateway.catalog_copy import CatalogCopy
from serve.gateway.discovery import Discovery
from serve.gateway.nginx import Nginx
from serve.gateway.prober import Prober, closed_together, together
from serve.gateway.settings import Settings
from serve.instance.logs import Followed, rotate

logger = logging.getLogger("gateway")
_TICK = 1.0
# As nginx writes it. A client's own words cannot look so: their quotes are escaped.
_OWN = re.compile(r'"status":(\d{3}),"from":"gateway"')
# Seconds for which a renamed log may still get lines: nginx keeps some back for one.
_LATE = 3.0


class ErrorCounts(Collector):
    """Counts the gateway's own answers from its access log, which names who answered; through rotation.

    What is in it at first was counted by somebody before. `/ping` is not in the log, and so its 503 not among them.
    """

    def __init__(self, log: Path) -> None:
        self.log = Followed(log, _LATE)
        self._lock = threading.Lock()
        self._counts: Counter[int] = Counter()

    def read(self) -> None:
        """Count what was added since."""
        with self._lock:
            self._counts.update(int(own[1]) for line in self.log.added() if (own := _OWN.search(line)))

    def collect(self) -> Iterator[Metric]:
        """Return the one metric; called on each scrape, by any thread."""
        self.read()
        family = CounterMetricFamily(
            "beeline_gateway_answers", "Errors that the gateway itself answered, by HTTP status.", labels=["status"]
        )
        for status in runtime.STATUSES:
            family.add_metric([str(status)], self._counts[status])
        yield family


class Gateway:
    """One gateway from start to end."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.nginx = Nginx(settings)
        self._woken = threading.Event()
        self._stopping = False
        self._said = self._state = ""
        self._shared = ([backend.inference for backend in settings.backends], list(settings.backends))
        self.prober = (
            Discovery(settings.name, self._woken.set)
            if settings.name is not None
            else Prober(settings, store.find_archives(settings.store) if settings.store else (), self._woken.set)
        )
        self.catalog_copy = CatalogCopy(settings, self._woken.set) if settings.name is not None else None
        self._begun = time.monotonic()
        self.error_counts = ErrorCounts(settings.access_log)
        self.collector = metrics.Collector(settings.worker_metrics) if settings.worker_metrics else None

    def run(self) -> None:
        """Run until told to stop.

        Raises:
            BeelineError: when nginx ended by itself.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._asked)
        at = self.settings.metrics
        counters = [self.error_counts, *([self.collector] if self.collector is not None else [])]
        exporter = metrics.serve_metrics((at.host, at.port), *counters) if at else None
        self.tell()
        self.nginx.start()
        self.prober.start()
        try:
            while not self._stopping:
                self._woken.wait(_TICK)
                self._woken.clear()
                self.nginx.check()
                try:
                    self.tell()
                    self.keep()
                except (OSError, ValueError):
                    # A full disk must not cost anybody an answer; the next round tries again.
                    logger.exception("the gateway's files cannot be kept")
        finally:
            gone = json.dumps({"status": "Unhealthy", "reason": "the gateway is stopping", "models": {}})
            try:
                runtime.write_state(self.settings, ready=False, text=gone, draining=self._stopping)
            except OSError:
                # On a full disk: what follows is what counts.
                logger.exception("/ping cannot be told that the gateway stops")
                self.settings.ready_file.unlink(missing_ok=True)
            if self._stopping:
                # Whoever stands before this gateway sees /ping, and looks elsewhere, before a request is refused.
                time.sleep(self.settings.drain)
            self.nginx.stop()
            if exporter is not None:
                exporter.stop()
            self.prober.stop()
            if self.catalog_copy is not None:
                self.catalog_copy.stop()
            self.error_counts.log.close()

    def tell(self) -> None:
        """Write what `/ping` answers, and let the ready backends share the load, where either changed."""
        seen = self.prober.seen()
        values, closed = together(seen), closed_together(seen)
        text = json.dumps(values)
        members, known = self.prober.members(), self.prober.backends()
        # Where none is ready the state alone keeps predictions out, and those on their way their backends.
        shared = (members or self._shared[0], known)
        changed = shared != self._shared and (self.settings.name is not None or len(known) > 1)
        # What is not taken is tried again in the next round.
        if changed and self.nginx.share(*shared):
            self._shared = shared
        if self.catalog_copy is not None and members:
            self.catalog_copy.follow(members)
            # Where the page hears for the first time that models are ready, it has their list.
            if not self.catalog_copy.settled:
                return
        if text != self._said:
            runtime.write_state(self.settings, values["status"] == "Healthy", text, closed=closed)
            if self.collector is not None:
                self.collector.expect(wanted(values["models"]))
            self._said = text
        state = values.get("reason", values["status"])
        if state != self._state:
            logger.info("%s, after %.1f s", state, time.monotonic() - self._begun)
            self._state = state

    def keep(self) -> None:
        """Do the small regular chores: rotate logs, fold ended workers' counts, put the others' choices into cards."""
        self.error_counts.read()
        renamed = [
            rotate(path, self.settings.log_megabytes * 1_000_000, self.settings.log_files)
            for path in (self.settings.access_log, self.settings.error_log)
        ]
        if any(renamed):
            self.nginx.reopen_logs()
        if self.collector is not None:
            catalog.add_choices(self.settings, self.collector.keep().choices())

    def _asked(self, number: int, frame: object) -> None:
        self._stopping = True
        self._woken.set()


def wanted(models: dict[str, dict[str, dict[str, int]]]) -> dict[tuple[str, str], int]:
    """Return how many workers each model is to have, by name and version."""
    return {(name, version): one["workers"] for name, versions in models.items() for version, one in versions.items()}


def main(arguments: list[str]) -> int:
    """Run the gateway of the folder that is the first argument."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stdout)
    try:
        Gateway(Settings.load(Path(arguments[0]))).run()
    except BeelineError as error:
        logger.error("the gateway failed: %s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
