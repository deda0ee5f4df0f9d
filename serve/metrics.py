"""The exporter of `/metrics`: what all workers of a server counted, in Prometheus' text format.

The names are the same on both servers, because the workers count and not the server.
"""

from __future__ import annotations

import collections
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from http import HTTPStatus
from pathlib import Path
from socket import AF_INET6
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector as AnyCollector

from beeline.errors import BeelineError
from serve import counts
from serve.counts import Counts, Key
from serve.ports import Address

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

logger = logging.getLogger(__name__)

# A loss is seen at once and a smaller number of workers is told a moment later, so a loss that nothing
# explains is a restart after this many seconds, or as soon as another worker has taken the place.
GRACE = 10.0


class Restarts:
    """Counts lost workers of one model and version; told regularly which live and how many are wanted."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin at zero; `clock` gives seconds."""
        self.count = 0
        self._clock = clock
        self._wanted: int | None = None
        self._living: Set[str] = frozenset()
        self._lost: set[str] = set()
        # When each loss was seen that nothing explains yet, and how many losses are still asked for.
        self._unexplained: list[float] = []
        self._asked_for = 0

    def expect(self, wanted: int) -> None:
        """Take how many workers there are to be from now on."""
        if self._wanted is not None:
            self._asked_for += max(0, self._wanted - wanted)
        self._wanted = wanted
        self._explain()

    def observe(self, living: Set[str], dead: Set[str] = frozenset()) -> None:
        """Take which workers live.

        Args:
            living: their names.
            dead: those that lived at any time and do not any more, so that one that came and went between
                two looks is counted too.
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
            # No more than wanted are left: scaling down is done and excuses nothing that comes later.
            self._asked_for = 0

    def _explain(self) -> None:
        explained = min(self._asked_for, len(self._unexplained))
        self._asked_for -= explained
        del self._unexplained[:explained]


class Collector(AnyCollector):
    """Adds up the files of a metrics folder on each scrape, ended workers' too: no counter goes down."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Watch a folder; those that ended before anybody watched are no restarts.

        Args:
            folder: where the workers count.
            clock: seconds, for tests.
        """
        self.folder = folder
        self._clock = clock
        self._lock = threading.Lock()
        self._restarts: dict[Key, Restarts] = {}
        with counts.lock(folder):
            seen = counts.scan(folder)
            counts.fold(folder, seen)
        for worker in seen.workers:
            self._of(worker.key)

    def expect(self, wanted: Mapping[Key, int]) -> None:
        """Take how many workers each model and version is to have; one that is not named keeps its number."""
        with self._lock:
            for key, number in wanted.items():
                self._of(key).expect(number)

    def keep(self) -> Counts:
        """Look at the workers, fold the files of those that have ended, and return what was there.

        Raises:
            OSError: when the folder cannot be written.
        """
        with self._lock, counts.lock(self.folder):
            seen = self._look()
            counts.fold(self.folder, seen)
        return seen

    def collect(self) -> Iterator[Metric]:
        """Return every metric; called on each scrape, by any thread. Raises nothing for what a file holds."""
        # One look after the other: an older one that came in later would find new workers gone.
        with self._lock, counts.lock(self.folder):
            seen = self._look()
            families = seen.families()
            restarts = {key: one.count for key, one in sorted(self._restarts.items())}
        yield from families
        living = collections.Counter(worker.key for worker in seen.living())
        running = GaugeMetricFamily(
            "beeline_workers", "Workers that have loaded their model and live.", labels=("model", "version")
        )
        lost = CounterMetricFamily(
            "beeline_worker_restarts",
            "Workers lost though no smaller number was asked for.",
            labels=("model", "version"),
        )
        # A model that is expected has its line from the start, with no workers.
        for key, count in restarts.items():
            running.add_metric(key, living[key])
            lost.add_metric(key, count)
        yield running
        yield lost
        yield GaugeMetricFamily(
            "beeline_metrics_files_unreadable", "Files among the workers' counts that are not counts.", seen.unreadable
        )

    def _look(self) -> Counts:
        """Tell each model's restarts which of its workers live, and which have ended."""
        seen = counts.scan(self.folder)
        for key in {*self._restarts, *(worker.key for worker in seen.workers)}:
            names = {worker.identity for worker in seen.workers if worker.key == key}
            self._of(key).observe(names - seen.ended, names & seen.ended)
        return seen

    def _of(self, key: Key) -> Restarts:
        return self._restarts.setdefault(key, Restarts(clock=self._clock))


class Exporter:
    """A running HTTP server of `/metrics`."""

    def __init__(self, server: WSGIServer) -> None:
        self.port = int(server.server_port)
        self._server = server
        self._thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="exporter", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(address: tuple[str, int], *collectors: AnyCollector) -> Exporter:
    """Serve `/metrics` in a thread.

    Args:
        address: host and port; a port of 0 takes a free one.
        collectors: what is asked on each scrape. Python's and the process' own metrics are not mixed in.

    Raises:
        BeelineError: when the address cannot be listened on.
    """
    host, port = address
    shown = Address(host, port)
    registry = CollectorRegistry(auto_describe=True)
    for collector in collectors:
        registry.register(collector)
    try:
        server = (_Server6 if ":" in host else _Server)(address, _Connection)
    except OSError as error:
        raise BeelineError(
            f"metrics cannot be served on {shown} ({error.strerror or error}); "
            "stop what listens there, or give another --metrics-port"
        ) from error
    server.set_app(_application(registry))
    return Exporter(server)


def _application(registry: CollectorRegistry) -> WSGIApplication:
    """Answer `GET /metrics` and refuse the rest; the library's own application answers on every path."""
    exposition = make_wsgi_app(registry)

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/metrics":
            return _refuse(start_response, HTTPStatus.NOT_FOUND, "NotFound", "there is nothing here but /metrics")
        if environ["REQUEST_METHOD"] != "GET":
            return _refuse(start_response, HTTPStatus.METHOD_NOT_ALLOWED, "MethodNotAllowed", "/metrics takes GET only")
        answer: Iterable[bytes] = exposition(environ, start_response)
        return answer

    return application


def _refuse(start_response: StartResponse, status: HTTPStatus, kind: str, message: str) -> list[bytes]:
    headers = [("Content-Type", "application/json")]
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        headers.append(("Allow", "GET"))
    start_response(f"{status.value} {status.phrase}", headers)
    return [json.dumps({"code": status.value, "type": kind, "message": message}).encode()]


class _Connection(WSGIRequestHandler):
    # Seconds for a client to say what it wants; each holds a thread.
    timeout = 10

    def log_message(self, format: str, *args: Any) -> None:
        """Keep each scrape out of the log."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Log a connection that broke, in one line."""
        logger.info("a connection to /metrics from %s broke (%s)", client_address, sys.exc_info()[1])


class _Server6(_Server):
    address_family = AF_INET6
