"""HTTP load from one thread of libcurl, closed loop or open loop, and what came of it.

libcurl keeps the connections, repeats a request whose kept connection the server has just closed, and ends what is
overdue, at 0.1 ms of CPU a request of 110 kB (bench/LOG.md compares clients).
"""

from __future__ import annotations

import itertools
import math
import mimetypes
import random
import socket
import ssl
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from types import MappingProxyType
from typing import Any
from urllib.parse import SplitResult, urlsplit

import certifi
import numpy as np
import pycurl

from beeline.errors import ConfigError, Undetermined
from bench.pictures import Pictures

STAGES = ("queue", "decode", "forward", "encode")
# `select` waits for descriptors below 1024, of which the process has some for itself.
MOST_CONNECTIONS = 900
_PERCENTILES = (50, 95, 99)
# Half the width of a normal distribution's 95 %, in standard deviations.
_WIDTH = 1.96
_CONNECT_SECONDS = 5.0
# Seconds between two looks at the backlog, and between two calls of `watch`.
_TICK, _WATCH = 0.1, 0.5
# Seconds before a client that could not connect tries again; else refusals would be all that it measures.
_PAUSE = 0.1
# Arrivals that are sent in one go; then answers are read.
_BURST = 64
# A whole picture goes to the kernel at once: with libcurl's default of 64 KiB a request costs half as much again.
_UPLOAD_BYTES = 1 << 18
_ERRORS = {
    pycurl.E_COULDNT_CONNECT: "Refused",
    pycurl.E_OPERATION_TIMEDOUT: "Timeout",
    pycurl.E_GOT_NOTHING: "Disconnected",
    pycurl.E_PARTIAL_FILE: "Disconnected",
    pycurl.E_SEND_ERROR: "Reset",
    pycurl.E_RECV_ERROR: "Reset",
    pycurl.E_UNSUPPORTED_PROTOCOL: "BadAnswer",
    pycurl.E_FTP_WEIRD_SERVER_REPLY: "BadAnswer",
}


def content_type(name: str) -> str:
    """Return what a picture of that file name is sent as."""
    return mimetypes.guess_type(name)[0] or "application/octet-stream"


@dataclass(frozen=True)
class Plan:
    """One load.

    Attributes:
        url: the full address, as in `http://127.0.0.1:8080/predictions/resnet18`.
        pictures: sent in turn, in an order shuffled by the seed.
        seconds: how long is measured.
        warm_up: seconds of the same load before that, not counted.
        clients: closed loop: so many clients, each of which sends again when it has its answer.
        rate: open loop: arrivals a second, whatever the server does. Exactly one of the two.
        poisson: whether arrivals come at random, as from many independent people, or evenly.
        deadline: seconds after its start (the intended one, in open loop) at which a request has failed.
        seed: of the pictures' order and the arrivals.
        most_connections: open loop: connections at once at most; an arrival that finds none waits, and its
            time counts.
        headers: of each request, instead of or in addition to `Content-Type`, which goes by the picture's name.
        heed_retry_after: closed loop: a client waits after a 429 as that says, instead of asking again at once.
    """

    url: str
    pictures: Pictures
    seconds: float = 10.0
    warm_up: float = 2.0
    clients: int | None = None
    rate: float | None = None
    poisson: bool = True
    deadline: float = 60.0
    seed: int = 0
    most_connections: int = 512
    headers: Mapping[str, str] = field(default_factory=dict)
    heed_retry_after: bool = False

    def __post_init__(self) -> None:
        """Check every number.

        Raises:
            ConfigError: naming the one that is impossible.
        """
        if (self.clients is None) == (self.rate is None):
            raise ConfigError("a load needs either clients (closed loop) or a rate (open loop), exactly one of them")
        for name in ("clients", "rate", "seconds", "deadline", "most_connections"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} is {value:g}; give more than 0")
        for name in ("clients", "most_connections"):
            if (getattr(self, name) or 0) > MOST_CONNECTIONS:
                raise ConfigError(f"{name} is {getattr(self, name)}; give at most {MOST_CONNECTIONS}")
        if self.warm_up < 0:
            raise ConfigError(f"warm_up is {self.warm_up:g}; give 0 or more seconds")
        if self.parts.scheme not in ("http", "https") or not self.parts.hostname:
            raise ConfigError(f"the URL is {self.url!r}; give one like http://127.0.0.1:8080/predictions/NAME")

    @property
    def parts(self) -> SplitResult:
        """The URL's parts."""
        return urlsplit(self.url)

    def requests(self) -> list[tuple[list[str], bytes]]:
        """Return each picture's headers and body in the order in which they are sent."""
        ready = []
        for name, body in zip(self.pictures.names, self.pictures.bodies, strict=True):
            headers = {"User-Agent": "beeline-bench", "Content-Type": content_type(name), **self.headers}
            ready.append(([f"{key}: {value}" for key, value in headers.items()], body))
        random.Random(self.seed).shuffle(ready)
        return ready


class Outcome:
    """What came of a load so far; `run` fills it, and it may be asked at any time.

    Latencies, statuses and errors are of the requests that began (open loop: were due) in the measured time,
    whenever they ended. Rates are of the answers that came in the measured time.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        # Seconds of `perf_counter`; the measured time, which an interruption ends early.
        self.begin = self.end = self.now = 0.0
        self.latencies = array("d")
        self.statuses: Counter[int] = Counter()
        self.errors: Counter[str] = Counter()
        self.batch_sizes: Counter[int] = Counter()
        self.stages = {name: array("d") for name in STAGES}
        self.answers = self.good = self.without_retry_after = 0
        # Open loop: by how many ms the client itself was late, and how many requests were without an answer when.
        self.late = array("d")
        self.waiting: list[tuple[float, int]] = []
        self.cpu = 0.0
        self.interrupted = False

    def add(
        self, start: float, end: float, answer: int | str, headers: Mapping[bytes, bytes] = MappingProxyType({})
    ) -> None:
        """Count one request: when it began and ended (`perf_counter`), and its status or the name of its error."""
        if isinstance(answer, int) and self.begin <= end < self.end:
            self.answers += 1
            self.good += answer == 200
        if not self.begin <= start < self.end:
            return
        if isinstance(answer, str):
            self.errors[answer] += 1
            return
        self.statuses[answer] += 1
        if answer == 200:
            self.latencies.append(1000 * (end - start))
        elif answer == 429:
            self.without_retry_after += b"retry-after" not in headers
        size = headers.get(b"x-batch-size", b"")
        if size.isdigit():
            self.batch_sizes[int(size)] += 1
        for part in headers.get(b"server-timing", b"").split(b","):
            name, _, value = part.partition(b";dur=")
            stage = self.stages.get(name.strip().decode("latin-1"))
            if stage is not None and value.replace(b".", b"", 1).isdigit():
                stage.append(float(value))

    @property
    def seconds(self) -> float:
        """How long was measured, so far."""
        return max(0.0, min(self.end, self.now) - self.begin)

    def summary(self) -> dict[str, Any]:
        """Return plain JSON values; what was not measured is None."""
        seconds, requests = self.seconds, sum(self.statuses.values()) + sum(self.errors.values())
        return {
            "mode": "closed" if self.plan.rate is None else "open",
            "clients": self.plan.clients,
            "rate": self.plan.rate,
            "seconds": round(seconds, 2),
            "requests": requests,
            "per_second": round(self.answers / seconds, 2) if seconds else 0.0,
            "good_per_second": round(self.good / seconds, 2) if seconds else 0.0,
            **self._latency(),
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "errors": dict(sorted(self.errors.items())),
            "failed": requests - self.statuses[200],
            "batch_sizes": {str(size): count for size, count in sorted(self.batch_sizes.items())},
            "timing_ms": {
                name: round(float(np.median(values)), 3) if values else None for name, values in self.stages.items()
            },
            "client_cpu": round(self.cpu / seconds, 3) if seconds else 0.0,
            "late_ms": round(float(np.percentile(self.late, 99)), 2) if self.late else None,
            "without_retry_after": self.without_retry_after,
            "backlog": self.backlog(),
            "interrupted": self.interrupted,
        }

    def _latency(self) -> dict[str, Any]:
        """Return percentiles, and where each lies with 95 % confidence by the ranks of independent latencies."""
        names, ordered = [f"p{each}_ms" for each in _PERCENTILES], np.sort(self.latencies)
        if not len(ordered):
            return {**dict.fromkeys([*names, "max_ms"]), "intervals_ms": dict.fromkeys(names)}
        values = np.percentile(ordered, [*_PERCENTILES, 100])
        intervals: dict[str, list[float] | None] = {}
        for name, percentile in zip(names, _PERCENTILES, strict=True):
            share, count = percentile / 100, len(ordered)
            half = _WIDTH * math.sqrt(count * share * (1 - share))
            low, high = math.floor(count * share - half), math.ceil(count * share + half)
            known = low > 0 and high < count
            intervals[name] = [round(float(ordered[rank]), 3) for rank in (low - 1, high)] if known else None
        found = {name: round(float(value), 3) for name, value in zip([*names, "max_ms"], values, strict=True)}
        return {**found, "intervals_ms": intervals}

    def backlog(self) -> dict[str, Any] | None:
        """Return how many requests were without an answer when sending ended, and whether ever more were.

        They grow when the line through them rises, over the measured time, by more than twice what the arrivals'
        own chance explains (the root of their number), 2 % of them and 5. None in closed loop.
        """
        if self.plan.rate is None:
            return None
        if len(self.waiting) < 3:
            return {"at_end": self.waiting[-1][1] if self.waiting else 0, "growing": False, "per_second": 0.0}
        times, counts = zip(*self.waiting, strict=True)
        slope = float(np.polyfit(np.array(times) - times[0], counts, 1)[0])
        arrivals = self.plan.rate * self.seconds
        growing = slope * self.seconds > max(5.0, 2 * arrivals**0.5, 0.02 * arrivals)
        return {"at_end": counts[-1], "growing": growing, "per_second": round(slope, 2)}

    def sentence(self, limit: str | None = None) -> str:
        """Return the figures as one sentence for people; what the server cannot hold is said.

        Args:
            limit: why the client is the limit, where it is: then nothing is said of the server.
        """
        figures = self.summary()
        load = f"{self.plan.clients} clients" if self.plan.rate is None else f"{self.plan.rate:g} arrivals/s"
        text = f"{load}: {figures['per_second']:.1f} answers/s over {figures['seconds']:.1f} s"
        if figures["p95_ms"] is not None:
            text += f", p50 {figures['p50_ms']:.0f} ms, p95 {figures['p95_ms']:.0f} ms, p99 {figures['p99_ms']:.0f} ms"
        text += f", {figures['failed']} of {figures['requests']} failed"
        if self.interrupted:
            text += "; interrupted"
        backlog = figures["backlog"]
        if limit is not None:
            text += f"; {limit}: this says nothing of the server"
        elif backlog and backlog["growing"]:
            text += (
                f"; the server does not hold {self.plan.rate:g}/s: {backlog['per_second']:.1f} more requests wait "
                f"each second, {backlog['at_end']} at the end, so that latencies only say how long this load was"
            )
        elif backlog and figures["failed"]:
            text += f"; the server does not hold {self.plan.rate:g}/s without failures"
        return text


Watch = Callable[[Outcome], None]


def run(plan: Plan, watch: Watch | None = None, outcome: Outcome | None = None) -> Outcome:
    """Make the load and wait for its end.

    An exception, as of Ctrl-C, ends it at once; a given `outcome` then holds what was measured until then.

    Args:
        plan: what to do.
        watch: called about twice a second with the outcome so far; the load waits for it.
        outcome: to fill; a new one by default.

    Raises:
        Undetermined: when nothing listens at the address.
    """
    parts = plan.parts
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    try:
        # None is looked up on the way: this is the first of the host's addresses that takes a connection.
        with socket.create_connection((host, port), _CONNECT_SECONDS) as probe:
            address = probe.getpeername()[0]
    except OSError as error:
        raise Undetermined(
            f"nothing answers at {host}:{port} ({error}); start a server, or give another URL"
        ) from error
    load = _Load(
        plan, outcome or Outcome(plan), watch, f"::[{address}]:{port}" if ":" in address else f"::{address}:{port}"
    )
    try:
        load.drive()
    finally:
        load.close()
    return load.outcome


class _Client:
    """One libcurl handle: the request that it carries, and the answer's head."""

    def __init__(self, plan: Plan, address: str) -> None:
        self.start = 0.0
        self.head: list[bytes] = []
        self.curl = curl = pycurl.Curl()
        curl.client = self
        options = {
            pycurl.URL: plan.url,
            pycurl.CONNECT_TO: [address],
            pycurl.PROXY: "",
            pycurl.HTTP_VERSION: pycurl.CURL_HTTP_VERSION_1_1,
            pycurl.POST: 1,
            pycurl.NOSIGNAL: 1,
            pycurl.UPLOAD_BUFFERSIZE: _UPLOAD_BYTES,
            # Methods of C: no Python runs within libcurl, where an exception of a signal's handler would be lost.
            pycurl.HEADERFUNCTION: self.head.append,
            pycurl.WRITEFUNCTION: deque[bytes](maxlen=0).append,
        }
        if plan.parts.scheme == "https":
            paths = ssl.get_default_verify_paths()
            # As Python trusts, which heeds SSL_CERT_FILE and SSL_CERT_DIR; libcurl's wheel knows no system's folder.
            options |= {pycurl.CAINFO: paths.cafile or certifi.where(), pycurl.CAPATH: paths.capath or ""}
        for option, value in options.items():
            curl.setopt(option, value)


class _Load:
    """One load while it runs; `address` is where libcurl connects to."""

    def __init__(self, plan: Plan, outcome: Outcome, watch: Watch | None, address: str) -> None:
        self.plan, self.outcome, self.watch, self.address = plan, outcome, watch, address
        self.requests = itertools.cycle(plan.requests())
        self.random = random.Random(plan.seed)
        self.busy: set[_Client] = set()
        self.idle: list[_Client] = []
        # Open loop: when those arrivals were due that found no connection. Closed loop: until when a client pauses.
        self.queue: deque[float] = deque()
        self.pauses: dict[_Client, float] = {}
        self.due = self.looked = self.watched = 0.0
        self.sending = True
        self.multi = pycurl.CurlMulti()
        self.multi.setopt(pycurl.M_MAXCONNECTS, plan.clients or plan.most_connections)

    def drive(self) -> None:
        """Warm up, measure, wait for the last answers."""
        plan, outcome = self.plan, self.outcome
        start = self.watched = perf_counter()
        outcome.begin = start + plan.warm_up
        outcome.end = outcome.begin + plan.seconds
        self.due = math.inf if plan.rate is None else start + self._gap()
        try:
            for _ in range(plan.clients or 0):
                self._send(_Client(plan, self.address), perf_counter())
            self._until(outcome.begin)
            outcome.cpu = -time.thread_time()
            self._until(outcome.end)
            # What was due while this process slept is late, and counts still.
            while self.due < outcome.end:
                self._arrive(perf_counter())
        except BaseException:
            outcome.interrupted = True
            outcome.end = max(outcome.begin, min(outcome.end, perf_counter()))
            raise
        finally:
            self.sending, outcome.now = False, perf_counter()
            outcome.cpu += time.thread_time() if outcome.cpu else 0.0
        self._sample(outcome.now)
        for due in self.queue:
            outcome.add(due, outcome.now, "NotSent")
        try:
            while self.busy:
                self._look()
                self._wait(self.looked + _TICK)
        except BaseException:
            outcome.interrupted = True
            for client in self.busy:
                outcome.add(client.start, perf_counter(), "Unanswered")
            raise

    def close(self) -> None:
        """Close every connection."""
        for client in self.busy:
            self.multi.remove_handle(client.curl)
        self.multi.close()

    def _until(self, when: float) -> None:
        """Send and take answers until then."""
        while (now := perf_counter()) < when:
            self._look()
            self._arrive(now)
            for client in [client for client, until in self.pauses.items() if until <= now]:
                del self.pauses[client]
                self._send(client, now)
            self._wait(min(when, self.due, self.looked + _TICK, *self.pauses.values()))

    def _gap(self) -> float:
        rate = self.plan.rate or 1.0
        return self.random.expovariate(rate) if self.plan.poisson else 1 / rate

    def _arrive(self, now: float) -> None:
        """Open loop: send what is due, whatever the server does; up to 1 ms late, which `late` says."""
        for _ in range(_BURST):
            if self.due > now or self.due >= self.outcome.end:
                return
            if self.due >= self.outcome.begin:
                self.outcome.late.append(1000 * (now - self.due))
            if self.idle or len(self.busy) < self.plan.most_connections:
                self._send(self.idle.pop() if self.idle else _Client(self.plan, self.address), self.due)
            else:
                self.queue.append(self.due)
            self.due += self._gap()
            now = perf_counter()

    def _send(self, client: _Client, start: float) -> None:
        """Send the next picture; its time counts from `start`."""
        headers, body = next(self.requests)
        client.start = start
        client.head.clear()
        # Else libcurl asks for leave first, and waits a second for it.
        client.curl.setopt(pycurl.HTTPHEADER, [*headers, "Expect:"])
        client.curl.setopt(pycurl.POSTFIELDS, body)
        left = self.plan.deadline - (perf_counter() - start)
        client.curl.setopt(pycurl.TIMEOUT_MS, max(1, round(1000 * left)))
        self.busy.add(client)
        self.multi.add_handle(client.curl)

    def _wait(self, until: float) -> None:
        """Let libcurl work, wait until then at the latest for what its connections bring, take what has ended."""
        self.multi.perform()
        _, done, failed = self.multi.info_read()
        for curl, code in [*((curl, None) for curl in done), *((curl, code) for curl, code, _ in failed)]:
            self._ended(curl.client, code)
        if done or failed:
            return
        wait, timer = until - perf_counter(), self.multi.timeout()
        wait = max(0.0, wait if timer < 0 else min(wait, timer / 1000))
        if self.busy:
            self.multi.select(wait)
        else:
            time.sleep(wait)

    def _ended(self, client: _Client, code: int | None) -> None:
        """Count a request that has ended, and let its client or its connection go on."""
        end, curl = perf_counter(), client.curl
        self.busy.discard(client)
        self.multi.remove_handle(curl)
        answer: int | str = curl.getinfo(pycurl.RESPONSE_CODE) if code is None else _ERRORS.get(code, f"Curl{code}")
        if code is None and b"\r\n" not in client.head:
            # Cut off within the head, which libcurl takes for its end.
            answer = "Disconnected"
        pairs = (line.partition(b":") for line in client.head)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        self.outcome.add(client.start, end, answer, headers)
        if not self.sending:
            return
        if self.queue:
            self._send(client, self.queue.popleft())
        elif self.plan.rate is not None:
            self.idle.append(client)
        elif answer == "Refused":
            self.pauses[client] = end + _PAUSE
        elif answer == 429 and self.plan.heed_retry_after:
            after = headers.get(b"retry-after", b"")
            self.pauses[client] = end + (float(after) if after.isdigit() else 1.0)
        else:
            self._send(client, end)

    def _look(self) -> None:
        """Now and then note how many wait, end what is overdue before it was sent, let the watcher look."""
        now = perf_counter()
        if now < self.looked + _TICK:
            return
        self.looked = now
        while self.queue and self.queue[0] < now - self.plan.deadline:
            self.outcome.add(self.queue.popleft(), now, "Timeout")
        if self.sending:
            self.outcome.now = now
            self._sample(now)
        if self.watch is not None and now - self.watched >= _WATCH:
            self.watched = now
            self.watch(self.outcome)

    def _sample(self, now: float) -> None:
        if self.plan.rate is not None and now >= self.outcome.begin:
            self.outcome.waiting.append((now, len(self.busy) + len(self.queue)))
