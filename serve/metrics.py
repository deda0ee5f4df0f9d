"""The exporter of `/metrics`: the counts of all workers of a server, in Prometheus' text format.

The workers count and not the server, so both servers have the same names.
"""

from __future__ import annotations

import collections
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector as AnyCollector

from beeline.errors import BeelineError
from serve import counts
from serve.counts import Counts, Key
from serve.ports import Address

logger = logging.getLogger(__name__)

# The loss of a worker may be seen a moment before the request that explains it. So an unexplained loss counts as a
# restart after this many seconds, or as soon as a new worker is there.
GRACE = 10.0


class Restarts:
    """Counts the lost workers of one model and version, from reports of the living and of the number wanted."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.count = 0
        self._clock = clock
        self._wanted: int | None = None
        self._living: Set[str] = frozenset()
        self._lost: set[str] = set()
        # When each unexplained loss was seen, and how many more losses scaling down explains.
        self._unexplained: list[float] = []
        self._asked_for = 0

    def expect(self, wanted: int) -> None:
        """Report how many workers should run from now on."""
        if self._wanted is not None:
            self._asked_for += max(0, self._wanted - wanted)
        self._wanted = wanted
        self._explain()

    def observe(self, living: Set[str], dead: Set[str] = frozenset()) -> None:
        """Report the names of the living workers and of all that have ended.

        So a worker counts that came and went between two reports.
        """
        lost = ((self._living - living) | dead) - self._lost
        new = living - self._living - self._lost
        now = self._clock()
        self._lost |= lost
        self._unexplained += [now] * len(lost)
        self._explain()
        overdue = sum(now - seen >= GRACE for seen in self._unexplained)
        restarted = max(overdue, min(len(new), len(self._unexplained)))
        del self._unexplained[:restarted]
        self.count += restarted
        self._living = frozenset(living)
        if self._wanted is not None and len(living) <= self._wanted:
            # Scaling down is done and explains no later loss.
            self._asked_for = 0

    def _explain(self) -> None:
        explained = min(self._asked_for, len(self._unexplained))
        self._asked_for -= explained
        del self._unexplained[:explained]


class Collector(AnyCollector):
    """Adds up the files of a metrics folder on each scrape, those of ended workers too, so that no counter goes down.

    Workers that ended before this object was made are no restarts.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._restarts = collections.defaultdict[Key, Restarts](lambda: Restarts(clock))
        with counts.lock(folder):
            self._ended_before = counts.scan(folder).ended

    def expect(self, workers: Mapping[Key, int]) -> None:
        """Report how many workers each model and version should have; others keep their number."""
        with self._lock:
            for key, number in workers.items():
                self._restarts[key].expect(number)

    def keep(self) -> Counts:
        """Scan the folder, fold the files of ended workers, and return what was there; raise OSError as `fold`."""
        with self._lock, counts.lock(self.folder):
            current = self._look()
            counts.fold(self.folder, current)
        return current

    def collect(self) -> Iterator[Metric]:
        """Yield every metric; called on each scrape, by any thread. It raises for no content of a file."""
        # One scan at a time, because the result of an older one, used later, would report new workers as gone.
        with self._lock, counts.lock(self.folder):
            current = self._look()
            families = current.families()
            restarts = {key: one.count for key, one in sorted(self._restarts.items())}
        yield from families
        living = collections.Counter(worker.key for worker in current.living())
        running = GaugeMetricFamily(
            "beeline_workers", "Workers that have loaded their model and live.", labels=("model", "version")
        )
        lost = CounterMetricFamily(
            "beeline_worker_restarts",
            "Workers lost though no smaller number was asked for.",
            labels=("model", "version"),
        )
        # An expected model has a line from the start, with 0 workers.
        for key, count in restarts.items():
            running.add_metric(key, living[key])
            lost.add_metric(key, count)
        yield running
        yield lost
        yield GaugeMetricFamily(
            "beeline_metrics_files_unreadable",
            "Files among the workers' counts that hold no counts.",
            current.unreadable,
        )

    def _look(self) -> Counts:
        """Scan the folder, and report each model's workers, living and ended, to its `Restarts`."""
        current = counts.scan(self.folder)
        for key in {*self._restarts, *(worker.key for worker in current.workers)}:
            names = {worker.identity for worker in current.workers if worker.key == key}
            self._restarts[key].observe(names - current.ended, names & current.ended - self._ended_before)
        return current


@contextmanager
def serve_metrics(address: tuple[str, int], *collectors: AnyCollector) -> Iterator[int]:
    """Serve the collectors' `/metrics` in threads during the context; give the port, a free one for 0.

    Raise BeelineError if nothing can listen on the address.
    """
    host, port = address
    registry = CollectorRegistry(auto_describe=True)
    for collector in collectors:
        registry.register(collector)
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise BeelineError(
            f"metrics cannot be served on {Address(host, port)} ({error.strerror or error}); "
            "stop what listens there, or give another --metrics-port"
        ) from error
    # The library's handler waits for ever, and its server prints a traceback for every broken connection.
    server.RequestHandlerClass = _Handler
    server.handle_error = _broken  # type: ignore[assignment,method-assign]
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(WSGIRequestHandler):
    # Seconds for a client to send its request; each holds a thread.
    timeout = 10

    def log_message(self, format: str, *args: object) -> None:
        """Keep scrapes out of the log."""


def _broken(request: object, client: object) -> None:
    logger.info("a connection to /metrics from %s broke (%s)", client, sys.exc_info()[1])
