"""What makes a load: connections, clients or arrivals, deadlines, on the event loop of one thread."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import ssl
import time
from collections import deque
from collections.abc import Callable
from time import perf_counter

from bench.load.connection import Connection, Exchange
from bench.load.outcome import Outcome
from bench.load.plan import Plan

Watch = Callable[[Outcome], None]
# Seconds between two looks at what is overdue and how many wait, and between two calls of `watch`.
_TICK, _WATCH = 0.1, 0.5
# Seconds before a client that could not connect tries again; else refusals would be all that it measures.
_PAUSE = 0.1
# Arrivals that are sent in one go; then answers are read.
_BURST = 64


class Generator:
    """One load while it runs.

    Args:
        plan: what to do.
        outcome: to fill.
        watch: called now and then with it.
        address: numeric host, and port.
    """

    def __init__(self, plan: Plan, outcome: Outcome, watch: Watch | None, address: tuple[str, int]) -> None:
        self.plan, self.outcome, self.watch, self.address = plan, outcome, watch, address
        self.tls = ssl.create_default_context() if plan.parts.scheme == "https" else None
        self.requests = itertools.cycle(plan.requests())
        self.random = random.Random(plan.seed)
        self.connections: set[Connection] = set()
        self.idle: list[Connection] = []
        self.opening: dict[asyncio.Task[None], Exchange] = {}
        # Open loop: arrivals that found no connection.
        self.queue: deque[Exchange] = deque()
        # Requests that were sent, or are about to be on a connection that opens, and have not ended.
        self.busy = 0
        self.due = 0.0
        self.sending = True
        self.quiet = asyncio.Event()
        self.stopped = asyncio.Event()
        self.loop: asyncio.AbstractEventLoop

    def interrupt(self) -> None:
        """End it now; called by a signal's handler on the loop's thread, at any moment."""
        self.outcome.interrupted = True
        self.stopped.set()

    async def drive(self) -> None:
        """Warm up, measure, wait for the last answers, close."""
        self.loop = asyncio.get_running_loop()
        outcome, start = self.outcome, perf_counter()
        outcome.begin = start + self.plan.warm_up
        outcome.end = outcome.begin + self.plan.seconds
        ticks = self.loop.create_task(self._tick())
        ticks.add_done_callback(lambda _: self.stopped.set())
        cpu = None
        try:
            for _ in range(self.plan.clients or 0):
                self._again(None)
            if self.plan.rate is not None:
                self.due = start + self._gap()
                self._arrive()
            await self._until(outcome.begin)
            cpu = time.thread_time()
            await self._until(outcome.end)
        finally:
            self.sending = False
            outcome.now = perf_counter()
            if outcome.interrupted:
                outcome.end = max(outcome.begin, min(outcome.end, outcome.now))
            outcome.cpu = 0.0 if cpu is None else time.thread_time() - cpu
            try:
                await self._drain()
            finally:
                ticks.cancel()
                await self._close()
        if ticks.done() and not ticks.cancelled():
            ticks.result()

    # Sending.

    def _again(self, connection: Connection | None) -> None:
        """Closed loop: a client sends its next request."""
        if not self.sending:
            if connection is not None:
                connection.close()
            return
        exchange = Exchange(perf_counter(), next(self.requests))
        self.busy += 1
        if connection is not None and connection.usable:
            connection.send(exchange)
        else:
            self._open(exchange)

    def _arrive(self) -> None:
        """Open loop: send what is due, whatever the server does, and come back when the next one is.

        The event loop's clock counts whole milliseconds, so a request leaves up to one late; `late` says it.
        """
        if not self.sending:
            return
        now = perf_counter()
        for _ in range(_BURST):
            if self.due > now:
                break
            exchange = Exchange(self.due, next(self.requests))
            if self.outcome.begin <= self.due < self.outcome.end:
                self.outcome.late.append(1000 * (now - self.due))
            self._dispatch(exchange)
            self.due += self._gap()
            now = perf_counter()
        if self.due <= now:
            self.loop.call_soon(self._arrive)
        elif self.due < self.outcome.end:
            self.loop.call_later(math.ceil(1000 * (self.due - now)) / 1000, self._arrive)

    def _dispatch(self, exchange: Exchange) -> None:
        """Open loop: send on an idle connection, else on a new one, else let it wait."""
        if self.idle:
            self.busy += 1
            self.idle.pop().send(exchange)
        elif len(self.connections) + len(self.opening) < self.plan.most_connections:
            self.busy += 1
            self._open(exchange)
        else:
            self.queue.append(exchange)

    def _gap(self) -> float:
        rate = self.plan.rate or 1.0
        return self.random.expovariate(rate) if self.plan.poisson else 1 / rate

    def _open(self, exchange: Exchange) -> None:
        task = self.loop.create_task(self._connect(exchange))
        self.opening[task] = exchange
        task.add_done_callback(lambda done: self.opening.pop(done, None))

    async def _connect(self, exchange: Exchange) -> None:
        host, port = self.address
        name = self.plan.parts.hostname if self.tls else None
        try:
            _, connection = await self.loop.create_connection(
                lambda: Connection(self._ended), host, port, ssl=self.tls, server_hostname=name
            )
        except OSError as error:
            exchange.fail("Refused" if isinstance(error, ConnectionRefusedError) else type(error).__name__)
            self._over(exchange, None)
            return
        if connection.usable:
            self.connections.add(connection)
            connection.send(exchange)
        else:
            exchange.fail("Disconnected")
            self._over(exchange, None)

    # Ending.

    def _ended(self, connection: Connection, exchange: Exchange | None) -> None:
        """Take an exchange back from its connection, or notice that an idle connection is lost."""
        if not connection.usable:
            self.connections.discard(connection)
        if exchange is None:
            if connection in self.idle:
                self.idle.remove(connection)
        elif connection.unheard and not exchange.resent and exchange.error in ("Disconnected", "Reset"):
            # Both servers close after an error's answer, and any closes after a while, which a request that is
            # sent at that moment meets. HTTP's clients send it again; its time goes on.
            exchange.resent, exchange.error = True, None
            self._open(exchange)
        else:
            self._over(exchange, connection)

    def _over(self, exchange: Exchange, connection: Connection | None) -> None:
        """Count an exchange that has ended, and let its client or its connection go on."""
        self.busy -= 1
        self.outcome.add(exchange)
        if not self.sending:
            if self.busy == 0:
                self.quiet.set()
        elif self.plan.rate is not None:
            self._free(connection)
        elif exchange.status == 429 and self.plan.heed_retry_after:
            told = exchange.headers.get(b"retry-after", b"")
            self.loop.call_later(float(told) if told.isdigit() else 1.0, self._again, connection)
        elif connection is None:
            self.loop.call_later(_PAUSE, self._again, None)
        else:
            self._again(connection)

    def _free(self, connection: Connection | None) -> None:
        """Open loop: give what has waited longest the place that became free."""
        usable = connection if connection is not None and connection.usable else None
        if self.queue:
            self.busy += 1
            exchange = self.queue.popleft()
            if usable is None:
                self._open(exchange)
            else:
                usable.send(exchange)
        elif usable is not None:
            self.idle.append(usable)

    async def _until(self, when: float) -> None:
        """Wait until then, or until it is stopped."""
        stopped = self.loop.create_task(self.stopped.wait())
        await asyncio.wait({stopped}, timeout=max(0.0, when - perf_counter()))
        stopped.cancel()

    async def _drain(self) -> None:
        """Wait for the answers that are on their way; what was never sent has failed."""
        self._sample()
        for exchange in self.queue:
            exchange.fail("NotSent")
            self.outcome.add(exchange)
        self.queue.clear()
        if self.busy and not self.stopped.is_set():
            waits = {self.loop.create_task(event.wait()) for event in (self.quiet, self.stopped)}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for each in waits:
                each.cancel()

    async def _close(self) -> None:
        for task in list(self.opening):
            task.cancel()
        await asyncio.gather(*self.opening, return_exceptions=True)
        for connection in self.connections:
            connection.close()
        # Transports close on the loop's next turn.
        await asyncio.sleep(0)

    # Looking.

    async def _tick(self) -> None:
        """End what is overdue, note how many wait, let the watcher look."""
        watched = perf_counter()
        while True:
            await asyncio.sleep(_TICK)
            now = perf_counter()
            self._expire(now - self.plan.deadline)
            if self.sending:
                self.outcome.now = now
                self._sample()
            if self.watch is not None and now - watched >= _WATCH:
                watched = now
                self.watch(self.outcome)

    def _sample(self) -> None:
        now = perf_counter()
        if self.plan.rate is not None and now >= self.outcome.begin:
            self.outcome.waiting.append((now, self.busy + len(self.queue)))

    def _expire(self, started: float) -> None:
        """Fail every request that started before then."""
        for connection in list(self.connections):
            if connection.exchange is not None and connection.exchange.start < started:
                connection.fail("Timeout")
        for task, exchange in list(self.opening.items()):
            if exchange.start < started:
                task.cancel()
                exchange.fail("Timeout")
                self._over(exchange, None)
        while self.queue and self.queue[0].start < started:
            exchange = self.queue.popleft()
            exchange.fail("Timeout")
            self.outcome.add(exchange)
