"""What came of a load: counts, percentiles of latency, rate, the backlog, in numbers and one sentence."""

from __future__ import annotations

from array import array
from collections import Counter
from typing import Any

import numpy as np

from bench.load.connection import Exchange
from bench.load.plan import Plan

STAGES = ("queue", "decode", "forward", "encode")
_PERCENTILES = (50, 95, 99)


class Outcome:
    """What came of a load so far; `run` fills it, and it may be asked at any time.

    Latencies, statuses and errors are of the requests that began (open loop: were due) in the measured time,
    whenever they ended. Rates are of the answers that came in the measured time.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        # Seconds of `perf_counter`; the measured time, which an interruption ends early.
        self.begin = self.end = 0.0
        self.now = 0.0
        self.latencies = array("d")
        self.statuses: Counter[int] = Counter()
        self.errors: Counter[str] = Counter()
        self.batch_sizes: Counter[int] = Counter()
        self.stages = {name: array("d") for name in STAGES}
        self.answers = self.good = 0
        self.resent = 0
        # 429 that do not say when to come back.
        self.untold = 0
        # Open loop: by when the client itself was too late, and how many requests waited for their answers.
        self.late = array("d")
        self.waiting: list[tuple[float, int]] = []
        self.cpu = 0.0
        self.interrupted = False

    def add(self, exchange: Exchange) -> None:
        """Count one request that has ended."""
        if exchange.status and self.begin <= exchange.end < self.end:
            self.answers += 1
            self.good += exchange.status == 200
        if not self.begin <= exchange.start < self.end:
            return
        self.resent += exchange.resent
        if exchange.error is not None:
            self.errors[exchange.error] += 1
            return
        self.statuses[exchange.status] += 1
        if exchange.status == 200:
            self.latencies.append(1000 * (exchange.end - exchange.start))
        elif exchange.status == 429:
            self.untold += b"retry-after" not in exchange.headers
        if exchange.headers:
            self._read(exchange.headers)

    def _read(self, headers: dict[bytes, bytes]) -> None:
        size = headers.get(b"x-batch-size", b"")
        if size.isdigit():
            self.batch_sizes[int(size)] += 1
        for part in headers.get(b"server-timing", b"").split(b","):
            name, _, value = part.partition(b";dur=")
            stage = self.stages.get(name.strip().decode("latin-1"))
            if stage is not None:
                try:
                    stage.append(float(value))
                except ValueError:
                    continue

    @property
    def seconds(self) -> float:
        """How long was measured, so far."""
        return max(0.0, min(self.end, self.now) - self.begin)

    @property
    def failed(self) -> int:
        """Requests that were not answered 200."""
        return sum(self.statuses.values()) - self.statuses[200] + sum(self.errors.values())

    @property
    def late_ms(self) -> float | None:
        """The 99th percentile of how late the client itself sent, in ms; None in closed loop."""
        return round(float(np.percentile(self.late, 99)), 2) if self.late else None

    def summary(self) -> dict[str, Any]:
        """Return plain JSON values; what was not measured is None."""
        seconds = self.seconds
        return {
            "mode": self.plan.mode,
            "clients": self.plan.clients,
            "rate": self.plan.rate,
            "seconds": round(seconds, 2),
            "requests": sum(self.statuses.values()) + sum(self.errors.values()),
            "per_second": round(self.answers / seconds, 2) if seconds else 0.0,
            "good_per_second": round(self.good / seconds, 2) if seconds else 0.0,
            **self._latency(),
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "errors": dict(sorted(self.errors.items())),
            "failed": self.failed,
            "batch_sizes": {str(size): count for size, count in sorted(self.batch_sizes.items())},
            "timing_ms": {
                name: round(float(np.median(values)), 3) if values else None for name, values in self.stages.items()
            },
            "client_cpu": round(self.cpu / seconds, 3) if seconds else 0.0,
            "late_ms": self.late_ms,
            "resent": self.resent,
            "without_retry_after": self.untold,
            "backlog": self.backlog(),
            "interrupted": self.interrupted,
        }

    def _latency(self) -> dict[str, float | None]:
        names = [*(f"p{percentile}_ms" for percentile in _PERCENTILES), "max_ms"]
        if not self.latencies:
            return dict.fromkeys(names)
        values = np.percentile(self.latencies, [*_PERCENTILES, 100])
        return {name: round(float(value), 3) for name, value in zip(names, values, strict=True)}

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
        who = f"{self.plan.clients} clients" if self.plan.rate is None else f"{self.plan.rate:g} arrivals/s"
        said = f"{who}: {figures['per_second']:.1f} answers/s over {figures['seconds']:.1f} s"
        if figures["p95_ms"] is not None:
            said += f", p50 {figures['p50_ms']:.0f} ms, p95 {figures['p95_ms']:.0f} ms, p99 {figures['p99_ms']:.0f} ms"
        said += f", {figures['failed']} of {figures['requests']} failed"
        if self.interrupted:
            said += "; interrupted"
        backlog = figures["backlog"]
        if limit is not None:
            said += f"; {limit}: this says nothing of the server"
        elif backlog and backlog["growing"]:
            said += (
                f"; the server does not hold {self.plan.rate:g}/s: {backlog['per_second']:.1f} more requests wait "
                f"each second, {backlog['at_end']} at the end, so that latencies only say how long this load was"
            )
        elif backlog and figures["failed"]:
            said += f"; the server does not hold {self.plan.rate:g}/s without failures"
        return said
