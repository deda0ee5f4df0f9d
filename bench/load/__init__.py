"""HTTP load from one thread of libcurl, closed loop or open loop, and its outcome.

libcurl keeps connections open, repeats a request whose kept connection the server has just closed, and ends overdue
requests, at 0.1 ms of CPU a request of 110 kB (bench/LOG.md compares clients).
"""

from __future__ import annotations

import heapq
import itertools
import math
import mimetypes
import random
import re
import ssl
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import certifi
import numpy as np
import pycurl

from beeline.errors import ConfigError
from bench.pictures import Pictures

STAGES = ("queue", "decode", "forward", "encode")
_TIMING = re.compile(rf"\b({'|'.join(STAGES)});dur=(\d+\.?\d*)".encode())
PERCENTILES = (50, 95, 99)
# An open loop has at most so many connections. `select` takes no descriptor over 1023.
_MOST_CONNECTIONS = 512
# Seconds between two samples of the backlog, and between two calls of `watch`.
_TICK, _WATCH = 0.1, 0.5
_NO_HEADERS: Mapping[bytes, bytes] = {}
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

    In a closed loop each client sends its next request when it has its answer. In an open loop requests are due at the
    rate, however slow the server is; one that finds no free connection waits, and the wait counts.
    """

    url: str  # in full, as in `http://127.0.0.1:8080/predictions/resnet18`
    pictures: Pictures  # sent in turn, in an order shuffled by the seed
    seconds: float = 10.0
    warm_up: float = 2.0  # seconds of the same load before, not counted
    clients: int | None = None
    rate: float | None = None  # arrivals a second
    poisson: bool = True  # whether arrivals come at random, as from many independent people, or evenly
    deadline: float = 60.0  # seconds after which a request has failed, in open loop from when it was due
    seed: int = 0  # of the pictures' order and the arrivals
    headers: Mapping[str, str] = field(default_factory=dict)  # `Content-Type`, by default, goes by the picture's name
    heed_retry_after: bool = False  # whether a client waits after a 429 as long as that says, or asks again at once

    def __post_init__(self) -> None:
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
        # Open loop: by how many ms the client itself was late; at which time how many requests had no answer.
        self.late = array("d")
        self.waiting: list[tuple[float, int]] = []
        self.cpu = 0.0
        self.interrupted = False

    def add(self, start: float, end: float, answer: int | str, headers: Mapping[bytes, bytes] = _NO_HEADERS) -> None:
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
        for name, value in _TIMING.findall(headers.get(b"server-timing", b"")):
            self.stages[name.decode()].append(float(value))

    @property
    def seconds(self) -> float:
        """How long was measured so far."""
        return max(0.0, min(self.end, self.now) - self.begin)

    def summary(self) -> dict[str, Any]:
        """Return plain JSON values; what was not measured is None."""
        seconds, requests = self.seconds, self.statuses.total() + self.errors.total()
        names = ["p50_ms", "p90_ms", "p95_ms", "p99_ms", "max_ms"]
        times = (
            [None] * 5 if not self.latencies else np.percentile(self.latencies, (50, 90, 95, 99, 100)).round(3).tolist()
        )
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
        figures = self.summary()
        parts = [f"{self.plan}: {figures['per_second']:.1f} answers/s over {figures['seconds']:.1f} s"]
        if self.latencies:
            parts += [f"p{each} {figures[f'p{each}_ms']:.0f} ms" for each in PERCENTILES]
        parts.append(f"{figures['failed']} of {figures['requests']} failed")
        text = ", ".join(parts) + "; interrupted" * self.interrupted
        if limit is not None:
            return f"{text}; {limit}: this says nothing about the server"
        backlog = figures["backlog"]
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
    """Make the load, wait for its end and return its outcome.

    An exception, such as that of Ctrl-C, ends the load at once; an `outcome` that was given has the figures until then.
    About twice a second the load calls `watch` with the outcome so far, and waits for it.
    """
    load = _Load(plan, outcome or Outcome(plan), watch)
    try:
        load.drive()
    finally:
        for curl in load.busy:
            load.multi.remove_handle(curl)
        load.multi.close()
    return load.outcome


def _client(plan: Plan) -> Any:
    """Return a libcurl handle; it keeps the `start` of its request and the `head` of the answer."""
    curl = pycurl.Curl()
    curl.start, curl.head = 0.0, []
    options = {
        pycurl.URL: plan.url,
        # A name is looked up once.
        pycurl.DNS_CACHE_TIMEOUT: -1,
        pycurl.PROXY: "",
        pycurl.HTTP_VERSION: pycurl.CURL_HTTP_VERSION_1_1,
        pycurl.POST: 1,
        pycurl.NOSIGNAL: 1,
        # A whole picture at once goes to the kernel: with the default of 64 KiB a request costs half as much again.
        pycurl.UPLOAD_BUFFERSIZE: 1 << 18,
        # C methods: inside libcurl, a callback in Python would lose the exception of a signal's handler.
        pycurl.HEADERFUNCTION: curl.head.append,
        pycurl.WRITEFUNCTION: deque[bytes](maxlen=0).append,
    }
    if plan.url.startswith("https:"):
        paths = ssl.get_default_verify_paths()
        # Python's certificates, which follow SSL_CERT_FILE and SSL_CERT_DIR; libcurl's wheel has none.
        options |= {pycurl.CAINFO: paths.cafile or certifi.where(), pycurl.CAPATH: paths.capath or ""}
    for option, value in options.items():
        curl.setopt(option, value)
    return curl


class _Load:
    def __init__(self, plan: Plan, outcome: Outcome, watch: Watch | None) -> None:
        self.plan, self.outcome, self.watch = plan, outcome, watch
        # Without an empty "Expect", libcurl asks the server before it sends a body, and waits a second for the answer.
        ready = [([*map(": ".join, headers.items()), "Expect:"], body) for headers, body in plan.requests()]
        self.requests = itertools.cycle(ready)
        self.random = random.Random(plan.seed)
        self.busy: set[Any] = set()
        self.idle: list[Any] = []
        self.last_tick, self.last_watch = 0.0, perf_counter()
        outcome.begin = self.last_watch + plan.warm_up
        outcome.end = outcome.begin + plan.seconds
        # A heap of the times at which unsent requests are due, and the time of an open loop's next arrival.
        self.queue = [self.last_watch] * (plan.clients or 0)
        self.next = self.last_watch + self._gap() if plan.rate else math.inf
        self.most = plan.clients or _MOST_CONNECTIONS
        self.multi = pycurl.CurlMulti()
        self.multi.setopt(pycurl.M_MAXCONNECTS, self.most)

    def drive(self) -> None:
        """Warm up, measure, wait for the last answers."""
        outcome = self.outcome
        try:
            self._until(outcome.begin)
            outcome.cpu = -time.thread_time()
            self._until(outcome.end)
            # Arrivals that were due while this process slept are late, and count.
            self._send_due(perf_counter())
        except BaseException:
            outcome.interrupted = True
            outcome.end = max(outcome.begin, min(outcome.end, perf_counter()))
            raise
        finally:
            outcome.now = perf_counter()
            outcome.cpu += time.thread_time() if outcome.cpu else 0.0
        self._sample(outcome.now)
        for due in self.queue if self.plan.rate else ():
            outcome.add(due, outcome.now, "NotSent")
        try:
            while self.busy:
                self._tick(perf_counter())
                self._wait(self.last_tick + _TICK)
        except BaseException:
            outcome.interrupted = True
            for curl in self.busy:
                outcome.add(curl.start, perf_counter(), "Unanswered")
            raise

    def _until(self, when: float) -> None:
        while (now := perf_counter()) < when:
            self._tick(now)
            self._send_due(now)
            # While all connections are busy, only an answer lets the next request go.
            due = self.queue[0] if self.queue and len(self.busy) < self.most else when
            self._wait(min(when, due, self.next, self.last_tick + _TICK))

    def _gap(self) -> float:
        rate = self.plan.rate or 1.0
        return self.random.expovariate(rate) if self.plan.poisson else 1 / rate

    def _send_due(self, now: float) -> None:
        """Send what is due, as far as connections are free; `late` has by how much an open loop itself is late."""
        while self.next <= now and self.next < self.outcome.end:
            if self.next >= self.outcome.begin:
                self.outcome.late.append(1000 * (now - self.next))
            heapq.heappush(self.queue, self.next)
            self.next += self._gap()
        while self.queue and self.queue[0] <= now and len(self.busy) < self.most:
            self._send(heapq.heappop(self.queue))

    def _send(self, start: float) -> None:
        """Send the next picture; its time counts from `start`."""
        curl = self.idle.pop() if self.idle else _client(self.plan)
        headers, body = next(self.requests)
        curl.start = start
        curl.head.clear()
        curl.setopt(pycurl.HTTPHEADER, headers)
        curl.setopt(pycurl.POSTFIELDS, body)
        curl.setopt(pycurl.TIMEOUT_MS, max(1, round(1000 * (start + self.plan.deadline - perf_counter()))))
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
        """Count a request that has ended; its client sends the next one at once, or after a pause."""
        end, pause = perf_counter(), 0.0
        self.busy.discard(curl)
        self.idle.append(curl)
        self.multi.remove_handle(curl)
        answer: int | str = curl.getinfo(pycurl.RESPONSE_CODE) if code is None else _ERRORS.get(code, f"Curl{code}")
        if code is None and b"\r\n" not in curl.head:
            # libcurl accepts a head that was cut off.
            answer = "Disconnected"
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in curl.head)}
        self.outcome.add(curl.start, end, answer, headers)
        if answer == "Refused":
            # Else it would measure nothing but refusals.
            pause = 0.1
        elif answer == 429 and self.plan.heed_retry_after:
            after = headers.get(b"retry-after", b"")
            pause = float(after) if after.isdigit() else 1.0
        if self.plan.rate is None:
            heapq.heappush(self.queue, end + pause)

    def _tick(self, now: float) -> None:
        """Every tick sample the backlog, end what is overdue before it was sent, and let the watcher look."""
        if now < self.last_tick + _TICK:
            return
        self.last_tick = now
        while self.plan.rate and self.queue and self.queue[0] < now - self.plan.deadline:
            self.outcome.add(heapq.heappop(self.queue), now, "Timeout")
        if now < self.outcome.end:
            self.outcome.now = now
            self._sample(now)
        if self.watch is not None and now - self.last_watch >= _WATCH:
            self.last_watch = now
            self.watch(self.outcome)

    def _sample(self, now: float) -> None:
        if self.plan.rate is not None and now >= self.outcome.begin:
            self.outcome.waiting.append((now, len(self.busy) + len(self.queue)))
