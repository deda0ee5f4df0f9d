"""The exporter of `/metrics`: what all workers of a server counted, in Prometheus' text format.

The names are the same on both servers, because the workers count and not the server.
"""

from __future__ import annotations

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
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector as AnyCollector
from prometheus_client.utils import floatToGoString

from beeline.errors import BeelineError
from serve import counts
from serve.counts import Buckets, Key, WorkerCounts
from serve.counts import choices as choices
from serve.counts import load as load
from serve.ports import Address

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

logger = logging.getLogger(__name__)

# A loss is seen at once and a smaller number of workers is told a moment later, so a loss that nothing
# explains is a restart after this many seconds, or as soon as another worker has taken the place.
GRACE = 10.0
_OF_MODEL = ("model", "version")
# By the worker's name: the exposed name, what one unit of the worker's is here, and the help text.
_HISTOGRAMS = {
    "batch_size": ("beeline_batch_size", 1, "Requests in a batch."),
    "queue_milliseconds": (
        "beeline_queue_seconds",
        1000,
        "Time of a request from its arrival at the gateway until its batch was begun.",
    ),
    "decode_milliseconds": ("beeline_decode_seconds", 1000, "Time of a batch in decoding its pictures."),
    "forward_milliseconds": ("beeline_forward_seconds", 1000, "Time of a batch in the model."),
    "encode_milliseconds": ("beeline_encode_seconds", 1000, "Time of a batch in writing its answers."),
}


class Restarts:
    """Counts lost workers of one model and version; told regularly which live and how many are wanted."""

    def __init__(self, before: Iterable[str] = (), clock: Callable[[], float] = time.monotonic) -> None:
        """Begin at zero.

        Args:
            before: workers lost before anybody watched; they are not counted.
            clock: seconds, for tests.
        """
        self.count = 0
        self._clock = clock
        self._wanted: int | None = None
        self._living: Set[str] = frozenset()
        self._lost = set(before)
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
    """Adds up the files of a metrics folder on each scrape, dead workers' too: no counter goes down."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Watch a folder, which may not be there yet.

        Args:
            folder: where the workers count.
            clock: seconds, for tests.
        """
        self.folder = folder
        self._clock = clock
        self._lock = threading.Lock()
        self._restarts: dict[Key, Restarts] = {}
        for key, workers in _by_key(load(folder)).items():
            lost = {one.file for one in workers} - {one.file for one in counts.living(workers)}
            self._restarts[key] = Restarts(lost, clock)

    def expect(self, wanted: Mapping[Key, int]) -> None:
        """Take how many workers each model and version is to have; one that is not named keeps its number."""
        with self._lock:
            for key, number in wanted.items():
                self._of(key).expect(number)

    def collect(self) -> Iterator[Metric]:
        """Return every metric; called on each scrape, by any thread. Raises nothing for what a file holds."""
        # One look after the other: an older one that came in later would find new workers gone.
        with self._lock:
            workers, unreadable = counts.scan(self.folder)
            alive = {one.file for one in counts.living(workers)}
            found = _by_key(workers)
            # A model that is expected has its line from the start, with no workers.
            grouped = {key: found.get(key, []) for key in sorted({*found, *self._restarts})}
            for key, ours in grouped.items():
                names = {one.file for one in ours}
                self._of(key).observe(names & alive, names - alive)
            restarts = {key: self._restarts[key].count for key in grouped}
        yield from _counters(grouped)
        for name in _HISTOGRAMS:
            yield _histogram(name, grouped)
        yield from _workers(grouped, alive, restarts)
        yield GaugeMetricFamily(
            "beeline_metrics_files_unreadable", "Files among the workers' counts that are not counts.", unreadable
        )

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


def _by_key(workers: Iterable[WorkerCounts]) -> dict[Key, list[WorkerCounts]]:
    grouped: dict[Key, list[WorkerCounts]] = {}
    for worker in workers:
        grouped.setdefault(worker.key, []).append(worker)
    return grouped


def _counters(grouped: Mapping[Key, list[WorkerCounts]]) -> Iterator[Metric]:
    answers = CounterMetricFamily(
        "beeline_answers", "Answers of the workers by HTTP status.", labels=(*_OF_MODEL, "status")
    )
    errors = CounterMetricFamily(
        "beeline_errors", "Answers of the workers that are errors, by their reason.", labels=(*_OF_MODEL, "reason")
    )
    for key, workers in grouped.items():
        for family, parts in ((answers, [one.answers for one in workers]), (errors, [one.reasons for one in workers])):
            for name in sorted({name for part in parts for name in part}):
                family.add_metric((*key, name), sum(part.get(name, 0) for part in parts))
    yield answers
    yield errors


def _histogram(name: str, grouped: Mapping[Key, list[WorkerCounts]]) -> Metric:
    exposed, unit, text = _HISTOGRAMS[name]
    family = HistogramMetricFamily(exposed, text, labels=_OF_MODEL)
    for key, workers in grouped.items():
        parts = [one.histograms[name] for one in workers if name in one.histograms]
        if parts:
            rows = _cumulative(parts)
            buckets = [(floatToGoString(bound / unit), count) for bound, count in rows]  # type: ignore[no-untyped-call]
            family.add_metric(key, buckets, sum(part.total for part in parts) / unit)
    return family


def _cumulative(parts: list[Buckets]) -> list[tuple[float, int]]:
    """Add histograms up: how many values are at most each bound, the last one infinite.

    Archives of different ages may have different bounds. Those that all have are exact; the others are left out.
    """
    bounds = sorted(set(parts[0].bounds).intersection(*(part.bounds for part in parts)))
    rows = [(bound, sum(sum(one.counts[: one.bounds.index(bound) + 1]) for one in parts)) for bound in bounds]
    return [*rows, (float("inf"), sum(sum(part.counts) for part in parts))]


def _workers(
    grouped: Mapping[Key, list[WorkerCounts]], alive: set[str], restarts: Mapping[Key, int]
) -> Iterator[Metric]:
    running = GaugeMetricFamily("beeline_workers", "Workers that have loaded their model and live.", labels=_OF_MODEL)
    starts = CounterMetricFamily(
        "beeline_worker_starts", "Workers that have loaded their model since the server's start.", labels=_OF_MODEL
    )
    lost = CounterMetricFamily(
        "beeline_worker_restarts", "Workers lost though no smaller number was asked for.", labels=_OF_MODEL
    )
    for key, workers in grouped.items():
        running.add_metric(key, sum(one.file in alive for one in workers))
        starts.add_metric(key, len(workers))
        lost.add_metric(key, restarts[key])
    yield running
    yield starts
    yield lost


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
