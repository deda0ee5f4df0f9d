"""HTTP load from one thread of libcurl, closed loop or open loop, and its outcome.

libcurl keeps connections open, repeats a request whose kept connection the server has just closed, and ends overdue
requests, at 0.1 ms of CPU a request of 110 kB (bench/LOG.md compares clients).
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
from urllib.parse import urlsplit

import certifi
import numpy as np
import pycurl

from beeline.errors import ConfigError, Undetermined
from bench.pictures import Pictures

STAGES = ("queue", "decode", "forward", "encode")
PERCENTILES = (50, 95, 99)
# An open loop has at most so many connections. `select` takes no descriptor over 1023.
_MOST_CONNECTIONS = 512
_CONNECT_SECONDS = 5.0
# Seconds between two samples of the backlog, and between two calls of `watch`.
_TICK, _WATCH = 0.1, 0.5
# Seconds before a client that could not connect tries again; otherwise it would measure nothing but refusals.
_PAUSE = 0.1
# At most so many arrivals are sent before answers are read.
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


@dataclass(frozen=True)
class Plan:
    """One load: a closed loop of `clients`, or an open loop at a `rate`.

    Attributes:
        url: the full address, as in `http://127.0.0.1:8080/predictions/resnet18`.
        pictures: sent in turn, in an order shuffled by the seed.
        seconds: how long to measure.
        warm_up: seconds of the same load before that, not counted.
        clients: each sends its next request when it has its answer.
        rate: arrivals a second, however slow the server is. An arrival that finds no free connection waits, and the
            wait counts.
        poisson: whether arrivals come at random, as from many independent people, or evenly.
        deadline: seconds after which a request has failed; in open loop they count from when it was due.
        seed: of the pictures' order and the arrivals.
        headers: of each request. `Content-Type`, by default, goes by the picture's name.
        heed_retry_after: whether a client waits after a 429 as long as that says, or asks again at once.
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
    headers: Mapping[str, str] = field(default_factory=dict)
    heed_retry_after: bool = False

    def __post_init__(self) -> None:
        """Raise `ConfigError` for both or none of clients and rate, and for no URL; the command checks the ranges."""
        if (self.clients is None) == (self.rate is None):
            raise ConfigError("a load needs either clients (closed loop) or a rate (open loop), exactly one of them")
        if not self.url.startswith(("http://", "https://")) or not urlsplit(self.url).hostname:
            raise ConfigError(f"the URL is {self.url!r}; give one like http://127.0.0.1:8080/predictions/NAME")

    def __str__(self) -> str:
        return f"{self.clients} clients" if self.rate is None else f"{self.rate:g} arrivals/s"

    def requests(self) -> list[tuple[dict[str, str], bytes]]:
        """Return each picture's headers and body in the order in which they are sent."""
        ready = []
        for name, body in zip(self.pictures.names, self.pictures.bodies, strict=True):
            content_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
            ready.append(({"User-Agent": "beeline-bench", "Content-Type": content_type, **self.headers}, body))
        random.Random(self.seed).shuffle(ready)
        return ready


class Outcome:
    """The figures of a load so far; `run` fills them, and they can be read at any time.

    Latencies, statuses and errors are of the requests that began (open loop: were due) in the measured time,
    whenever they ended. Rates are of the answers that came in the measured time.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        # The measured time in seconds of `perf_counter`; an interruption ends it early.
        self.begin = self.end = self.now = 0.0
        self.latencies = array("d")
        self.statuses: Counter[int] = Counter()
        self.errors: Counter[str] = Counter()
        self.batch_sizes: Counter[int] = Counter()
        self.stages = {name: array("d") for name in STAGES}
        self.answers = self.good = self.without_retry_after = 0
        # Open loop: by how many ms the client itself was late; times, and how many requests had no answer then.
        self.late = array("d")
        self.waiting: list[tuple[float, int]] = []
        self.cpu = 0.0
        self.interrupted = False

    def add(
        self, start: float, end: float, answer: int | str, headers: Mapping[bytes, bytes] = MappingProxyType({})
    ) -> None:
        """Count one request by its start and end (`perf_counter`), its status or the name of its error."""
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
        """How long was measured so far."""
        return max(0.0, min(self.end, self.now) - self.begin)

    def summary(self) -> dict[str, Any]:
        """Return plain JSON values; what was not measured is None."""
        seconds, requests = self.seconds, sum(self.statuses.values()) + sum(self.errors.values())
        names = [*(f"p{each}_ms" for each in PERCENTILES), "max_ms"]
        times = np.percentile(self.latencies, [*PERCENTILES, 100]).round(3).tolist() if self.latencies else [None] * 4
        return {
            "mode": "closed" if self.plan.rate is None else "open",
            "clients": self.plan.clients,
            "rate": self.plan.rate,
            "seconds": round(seconds, 2),
            "requests": requests,
            "per_second": round(self.answers / seconds, 2) if seconds else 0.0,
            "good_per_second": round(self.good / seconds, 2) if seconds else 0.0,
            **dict(zip(names, times, strict=True)),
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "errors": dict(sorted(self.errors.items())),
            "failed": requests - self.statuses[200],
            "batch_sizes": {str(size): count for size, count in sorted(self.batch_sizes.items())},
            "timing_ms": {
                name: round(float(np.median(values)), 3) if values else None for name, values in self.stages.items()
            },
            "client_cpu": round(self.cpu / seconds, 3) if seconds else 0.0,
            # What one core could send at least, since the client also spends CPU time while it waits for answers.
            "ceiling_per_second": round(requests / self.cpu, 2) if self.cpu else 0.0,
            "late_ms": round(float(np.percentile(self.late, 99)), 2) if self.late else None,
            "without_retry_after": self.without_retry_after,
            "backlog": self.backlog(),
            "interrupted": self.interrupted,
        }

    def backlog(self) -> dict[str, Any] | None:
        """Return how many requests had no answer when sending ended, and whether that grew; None in closed loop.

        It grew where the line through the samples rises, over the measured time, by more than 5, more than 2 % of the
        arrivals, and more than twice what chance explains (the root of their number).
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
        """Return the figures as one sentence for people; where the client is the limit, `limit` says why."""
        figures, backlog = self.summary(), self.backlog()
        parts = [f"{self.plan}: {figures['per_second']:.1f} answers/s over {figures['seconds']:.1f} s"]
        if self.latencies:
            parts += [f"p{each} {figures[f'p{each}_ms']:.0f} ms" for each in PERCENTILES]
        parts.append(f"{figures['failed']} of {figures['requests']} failed")
        text = ", ".join(parts) + "; interrupted" * self.interrupted
        if limit is not None:
            return f"{text}; {limit}: this says nothing about the server"
        if backlog and backlog["growing"]:
            return (
                f"{text}; the server does not hold {self.plan.rate:g}/s: each second {backlog['per_second']:.1f} more "
                f"requests wait, {backlog['at_end']} at the end, so the latencies only show how long this load was"
            )
        if backlog and figures["failed"]:
            return f"{text}; the server does not hold {self.plan.rate:g}/s without failures"
        return text


Watch = Callable[[Outcome], None]


def run(plan: Plan, watch: Watch | None = None, outcome: Outcome | None = None) -> Outcome:
    """Make the load, wait for its end and return its outcome; raise `Undetermined` when nothing listens there.

    An exception, such as that of Ctrl-C, ends the load at once; an `outcome` that was given has the figures until then.
    About twice a second the load calls `watch` with the outcome so far, and waits for it.
    """
    parts = urlsplit(plan.url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    try:
        # The name is looked up once, here: libcurl connects to the first address that takes a connection.
        with socket.create_connection((host, port), _CONNECT_SECONDS) as probe:
            address = probe.getpeername()[0]
    except OSError as error:
        raise Undetermined(
            f"nothing answers at {host}:{port} ({error}); start a server, or give another URL"
        ) from error
    connect_to = f"::[{address}]:{port}" if ":" in address else f"::{address}:{port}"
    load = _Load(plan, outcome or Outcome(plan), watch, connect_to)
    try:
        load.drive()
    finally:
        load.close()
    return load.outcome


def _client(plan: Plan, address: str) -> Any:
    """Return a libcurl handle; it keeps the `start` of its request and the `head` of the answer."""
    curl = pycurl.Curl()
    curl.start, curl.head = 0.0, []
    options = {
        pycurl.URL: plan.url,
        pycurl.CONNECT_TO: [address],
        pycurl.PROXY: "",
        pycurl.HTTP_VERSION: pycurl.CURL_HTTP_VERSION_1_1,
        pycurl.POST: 1,
        pycurl.NOSIGNAL: 1,
        pycurl.UPLOAD_BUFFERSIZE: _UPLOAD_BYTES,
        # Methods of C: Python code would lose an exception of a signal's handler inside libcurl.
        pycurl.HEADERFUNCTION: curl.head.append,
        pycurl.WRITEFUNCTION: deque[bytes](maxlen=0).append,
    }
    if plan.url.startswith("https:"):
        paths = ssl.get_default_verify_paths()
        # The certificates of Python, which heeds SSL_CERT_FILE and SSL_CERT_DIR: libcurl's wheel knows no folder.
        options |= {pycurl.CAINFO: paths.cafile or certifi.where(), pycurl.CAPATH: paths.capath or ""}
    for option, value in options.items():
        curl.setopt(option, value)
    return curl


class _Load:
    """One load while it runs; `address` is where libcurl connects to."""

    def __init__(self, plan: Plan, outcome: Outcome, watch: Watch | None, address: str) -> None:
        self.plan, self.outcome, self.watch, self.address = plan, outcome, watch, address
        # Without an empty "Expect" libcurl asks before it sends a body, and waits a second for leave.
        ready = [([*map(": ".join, headers.items()), "Expect:"], body) for headers, body in plan.requests()]
        self.requests = itertools.cycle(ready)
        self.random = random.Random(plan.seed)
        self.busy: set[Any] = set()
        self.idle: list[Any] = []
        # Open loop: when the arrivals were due that wait for a connection. Closed loop: until when a client pauses.
        self.queue: deque[float] = deque()
        self.pauses: dict[Any, float] = {}
        self.due = self.last_tick = self.last_watch = 0.0
        self.sending = True
        self.multi = pycurl.CurlMulti()
        self.multi.setopt(pycurl.M_MAXCONNECTS, plan.clients or _MOST_CONNECTIONS)

    def drive(self) -> None:
        """Warm up, measure, wait for the last answers."""
        plan, outcome = self.plan, self.outcome
        start = self.last_watch = perf_counter()
        outcome.begin = start + plan.warm_up
        outcome.end = outcome.begin + plan.seconds
        self.due = math.inf if plan.rate is None else start + self._gap()
        try:
            for _ in range(plan.clients or 0):
                self._send(_client(plan, self.address), perf_counter())
            self._until(outcome.begin)
            outcome.cpu = -time.thread_time()
            self._until(outcome.end)
            # Arrivals that were due while this process slept are late, and count.
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
                self._tick()
                self._wait(self.last_tick + _TICK)
        except BaseException:
            outcome.interrupted = True
            for curl in self.busy:
                outcome.add(curl.start, perf_counter(), "Unanswered")
            raise

    def close(self) -> None:
        """Close every connection."""
        for curl in self.busy:
            self.multi.remove_handle(curl)
        self.multi.close()

    def _until(self, when: float) -> None:
        """Send requests and take answers until then."""
        while (now := perf_counter()) < when:
            self._tick()
            self._arrive(now)
            for curl in [curl for curl, until in self.pauses.items() if until <= now]:
                del self.pauses[curl]
                self._send(curl, now)
            self._wait(min(when, self.due, self.last_tick + _TICK, *self.pauses.values()))

    def _gap(self) -> float:
        rate = self.plan.rate or 1.0
        return self.random.expovariate(rate) if self.plan.poisson else 1 / rate

    def _arrive(self, now: float) -> None:
        """Open loop: send what is due, however slow the server is; `late` has by how much the client is late."""
        for _ in range(_BURST):
            if self.due > now or self.due >= self.outcome.end:
                return
            if self.due >= self.outcome.begin:
                self.outcome.late.append(1000 * (now - self.due))
            if self.idle or len(self.busy) < _MOST_CONNECTIONS:
                self._send(self.idle.pop() if self.idle else _client(self.plan, self.address), self.due)
            else:
                self.queue.append(self.due)
            self.due += self._gap()
            now = perf_counter()

    def _send(self, curl: Any, start: float) -> None:
        """Send the next picture; its time counts from `start`."""
        headers, body = next(self.requests)
        curl.start = start
        curl.head.clear()
        curl.setopt(pycurl.HTTPHEADER, headers)
        curl.setopt(pycurl.POSTFIELDS, body)
        left = self.plan.deadline - (perf_counter() - start)
        curl.setopt(pycurl.TIMEOUT_MS, max(1, round(1000 * left)))
        self.busy.add(curl)
        self.multi.add_handle(curl)

    def _wait(self, until: float) -> None:
        """Let libcurl work and take what has ended; if nothing has, wait for its connections, until then at most."""
        self.multi.perform()
        _, done, failed = self.multi.info_read()
        for curl, code in [*((curl, None) for curl in done), *((curl, code) for curl, code, _ in failed)]:
            self._finish(curl, code)
        if done or failed:
            return
        wait, timer = until - perf_counter(), self.multi.timeout()
        wait = max(0.0, wait if timer < 0 else min(wait, timer / 1000))
        if self.busy:
            self.multi.select(wait)
        else:
            time.sleep(wait)

    def _finish(self, curl: Any, code: int | None) -> None:
        """Count a request that has ended, and use its handle again."""
        end = perf_counter()
        self.busy.discard(curl)
        self.multi.remove_handle(curl)
        answer: int | str = curl.getinfo(pycurl.RESPONSE_CODE) if code is None else _ERRORS.get(code, f"Curl{code}")
        if code is None and b"\r\n" not in curl.head:
            # libcurl takes a head that was cut off for a whole one.
            answer = "Disconnected"
        pairs = (line.partition(b":") for line in curl.head)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        self.outcome.add(curl.start, end, answer, headers)
        if not self.sending:
            return
        if self.queue:
            self._send(curl, self.queue.popleft())
        elif self.plan.rate is not None:
            self.idle.append(curl)
        elif answer == "Refused":
            self.pauses[curl] = end + _PAUSE
        elif answer == 429 and self.plan.heed_retry_after:
            after = headers.get(b"retry-after", b"")
            self.pauses[curl] = end + (float(after) if after.isdigit() else 1.0)
        else:
            self._send(curl, end)

    def _tick(self) -> None:
        """Every tick sample the backlog, end what is overdue before it was sent, and let the watcher look."""
        now = perf_counter()
        if now < self.last_tick + _TICK:
            return
        self.last_tick = now
        while self.queue and self.queue[0] < now - self.plan.deadline:
            self.outcome.add(self.queue.popleft(), now, "Timeout")
        if self.sending:
            self.outcome.now = now
            self._sample(now)
        if self.watch is not None and now - self.last_watch >= _WATCH:
            self.last_watch = now
            self.watch(self.outcome)

    def _sample(self, now: float) -> None:
        if self.plan.rate is not None and now >= self.outcome.begin:
            self.outcome.waiting.append((now, len(self.busy) + len(self.queue)))
