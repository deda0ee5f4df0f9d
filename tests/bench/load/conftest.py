"""A small real HTTP server on this machine that answers as a test wants, and pictures for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from bench.load import Outcome, Plan
from bench.pictures import Pictures

PICTURES = Pictures("some/pictures", ("a.jpg", "b.png", "c"), (b"first" * 9, b"second" * 900, b"third" * 30_000))


def answer(body: bytes = b"{}", status: str = "200 OK", *headers: str, length: bool = True) -> bytes:
    """Return a whole answer; without its length it ends with the connection."""
    lines = [f"HTTP/1.1 {status}", *headers, *([f"Content-Length: {len(body)}"] if length else [])]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@dataclass(frozen=True)
class Arrival:
    """One request: how many came before it, how many of them on its connection, and itself."""

    index: int
    turn: int
    head: str
    body: bytes


# What is sent back; None cuts the connection. An answer that says `Connection: close` is followed by that.
Respond = Callable[[Arrival], Awaitable[bytes | None]]


class LocalServer:
    """Answers on a free port, on an event loop of its own thread."""

    def __init__(self, respond: Respond) -> None:
        self.respond = respond
        self.arrivals: list[Arrival] = []
        self.open = self.most_open = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        start = asyncio.start_server(self._connection, "127.0.0.1", 0, limit=1 << 20)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result(30)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    def refuse(self) -> None:
        """Take no more connections."""
        self._server.close()

    async def _end(self) -> None:
        self._server.close()
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        turn = 0
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = int(head.lower().partition("content-length:")[2].split("\r\n")[0] or 0)
                arrival = Arrival(len(self.arrivals), turn, head, await reader.readexactly(length))
                self.arrivals.append(arrival)
                turn += 1
                said = await self.respond(arrival)
                writer.write(said or b"")
                await writer.drain()
                if said is None or b"connection: close" in said.lower():
                    return
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            return
        finally:
            self.open -= 1
            writer.close()


Serve = Callable[[Respond], LocalServer]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start servers; all end with the test."""
    running: list[LocalServer] = []

    def start(respond: Respond) -> LocalServer:
        running.append(LocalServer(respond))
        return running[-1]

    yield start
    for server in running:
        server.stop()


def always(said: bytes | None, seconds: float = 0.0) -> Respond:
    """Return a server that sends the same to each request, after so many seconds."""

    async def respond(arrival: Arrival) -> bytes | None:
        await asyncio.sleep(seconds)
        return said

    return respond


good = always(answer())


def plan(server: LocalServer, **changes: Any) -> Plan:
    """Return a short load on it."""
    return Plan(f"{server.url}/predictions/x", **{"pictures": PICTURES, "seconds": 0.5, "warm_up": 0.1, **changes})


def outcome(now: float, **changes: Any) -> Outcome:
    """Return the outcome of a load, of two clients by default, whose measured time is 100 to 110."""
    made = Outcome(Plan("http://127.0.0.1:1/predictions/x", PICTURES, **(changes or {"clients": 2})))
    made.begin, made.end, made.now = 100.0, 110.0, now
    return made
