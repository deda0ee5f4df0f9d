"""The gateway process: nginx, which listens in public, the prober behind `/ping`, and the exporter of `/metrics`.

Run as `python -m serve.gateway FOLDER`, the runtime folder that `serve.gateway.runtime` made. On SIGTERM it stops
being ready, answers the requests that it has, and ends.
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
from contextlib import ExitStack
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from archive import store
from beeline.errors import BeelineError
from serve import metrics
from serve.gateway import catalog, runtime
from serve.gateway.discovery import Discovery
from serve.gateway.nginx import Nginx
from serve.gateway.prober import Probe, Prober, closed_together, together
from serve.gateway.settings import Settings
from serve.instance.logs import Followed, rotate

logger = logging.getLogger("gateway")
_TICK = 1.0
# As nginx writes it; in what a client sends, quotes are escaped.
_OWN = re.compile(r'"status":(\d{3}),"from":"gateway"')
# Seconds for which a renamed log may still get lines: nginx buffers them for one second.
_LATE = 3.0


class ErrorCounts(Collector):
    """Counts the gateway's own answers from its access log, which names who answered, through rotation.

    Lines that are there at the start do not count: an earlier gateway has counted them. `/ping` is not in the log, so
    its 503 is not counted.
    """

    def __init__(self, log: Path) -> None:
        self.log = Followed(log, _LATE)
        self._lock = threading.Lock()
        self._counts: Counter[int] = Counter()

    def read(self) -> None:
        """Count the lines that were added since the last call."""
        with self._lock:
            self._counts.update(int(own[1]) for line in self.log.added() if (own := _OWN.search(line)))

    def collect(self) -> Iterator[Metric]:
        """Yield the one metric; called on each scrape, by any thread."""
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
        self._woken = threading.Event()
        self._stopping = False
        self._ping = self._state = ""
        self._shared = ([backend.inference for backend in settings.backends], list(settings.backends))
        self.prober: Prober
        if settings.name is not None:
            self.prober = Discovery(settings.name, self._woken.set)
        else:
            archives = store.find_archives(settings.store) if settings.store else ()
            probes = [Probe(backend, archives, settings) for backend in settings.backends]
            self.prober = Prober(probes, self._woken.set)
        self._begun = time.monotonic()
        self.error_counts = ErrorCounts(settings.access_log)
        self.collector = metrics.Collector(settings.worker_metrics) if settings.worker_metrics else None

    def run(self) -> None:
        """Run until a signal asks to stop.

        Raises:
            BeelineError: when nginx ended by itself.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._asked)
        with ExitStack() as stack:
            if at := self.settings.metrics:
                counters = [self.error_counts, *([self.collector] if self.collector is not None else [])]
                stack.enter_context(metrics.serve_metrics((at.host, at.port), *counters))
            self._run()

    def _run(self) -> None:
        self.nginx = Nginx(self.settings)
        self.tell()
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
                    logger.exception("the gateway's files cannot be written")
        finally:
            gone = json.dumps({"status": "Unhealthy", "reason": "the gateway is stopping", "models": {}})
            try:
                runtime.write_state(self.settings, ready=False, text=gone, draining=self._stopping)
            except OSError:
                # A full disk; removing the file takes none.
                logger.exception("/ping cannot say that the gateway stops")
                (self.settings.state / "ready").unlink(missing_ok=True)
            if self._stopping:
                # A load balancer in front sees /ping and sends requests elsewhere before one is refused here.
                time.sleep(self.settings.drain)
            self.nginx.stop()
            self.prober.stop()
            self.error_counts.log.close()

    def tell(self) -> None:
        """Write what `/ping` answers and which backends share the load, where either has changed."""
        seen = self.prober.seen()
        values, closed = together(seen), closed_together(seen)
        text = json.dumps(values)
        members, known = self.prober.members(), self.prober.backends()
        # With no ready backend nginx keeps the last group, for requests under way; the state refuses new ones.
        shared = (members or self._shared[0], known)
        changed = shared != self._shared and (self.settings.name is not None or len(known) > 1)
        # Where nginx does not take the change, the next round tries again.
        if changed and self.nginx.share(*shared):
            self._shared = shared
        if text != self._ping:
            runtime.write_state(self.settings, values["status"] == "Healthy", text, closed=closed)
            if self.collector is not None:
                self.collector.expect(wanted(values["models"]))
            self._ping = text
        state = values.get("reason", values["status"])
        if state != self._state:
            logger.info("%s, after %.1f s", state, time.monotonic() - self._begun)
            self._state = state

    def keep(self) -> None:
        """Rotate logs, fold the counts of workers that have ended, and put the others' choices into the cards."""
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
    """Return how many workers each model should have, by name and version."""
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
