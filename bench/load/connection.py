"""One keep-alive HTTP/1.1 connection of the load: a ready request goes out, its answer is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import perf_counter
from typing import cast

import httptools

_WANTED = frozenset((b"x-batch-size", b"server-timing", b"retry-after"))
_LENGTHS = frozenset((b"content-length", b"transfer-encoding"))


class Exchange:
    """One request and what came of it: a status, or the name of an error.

    Attributes:
        start: when it began (closed loop) or was due (open loop); seconds of `perf_counter`.
        request: what is written.
        end: when the answer was whole, or it failed.
        status: of the answer; 0 without one.
        error: the name of what went wrong; None with an answer.
        headers: those of the answer that the load reads, names in lower case.
        resent: whether it was sent again on a new connection.
    """

    __slots__ = ("end", "error", "headers", "request", "resent", "start", "status")

    def __init__(self, start: float, request: bytes) -> None:
        self.start = start
        self.request = request
        self.end = 0.0
        self.status = 0
        self.error: str | None = None
        self.headers: dict[bytes, bytes] = {}
        self.resent = False

    def fail(self, error: str) -> None:
        """End it with an error."""
        self.error = error
        self.end = perf_counter()


class Connection(asyncio.Protocol):
    """A connection that carries one exchange at a time.

    `ended` is called when the exchange on it has ended, and also, with None, when it is lost between two. It is
    still usable where `usable` says so.
    """

    def __init__(self, ended: Callable[[Connection, Exchange | None], None]) -> None:
        self._ended = ended
        self._transport: asyncio.Transport | None = None
        # As `Any`, since a protocol class may leave callbacks out.
        self._parser = httptools.HttpResponseParser(self)
        self.exchange: Exchange | None = None
        self.usable = False
        self.answers = 0
        self._begun = self._measured = self._open_ended = False

    def send(self, exchange: Exchange) -> None:
        """Send one request; the connection must be usable and idle."""
        assert self._transport is not None
        self.exchange = exchange
        self._begun = self._open_ended = False
        self._transport.write(exchange.request)

    def close(self) -> None:
        """Close at once, without telling."""
        self.usable = False
        self.exchange = None
        if self._transport is not None:
            self._transport.abort()

    def fail(self, error: str) -> None:
        """End the exchange with an error, and close."""
        exchange = self.exchange
        self.close()
        if exchange is not None:
            exchange.fail(error)
        self._ended(self, exchange)

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        # uvloop's transports are not the standard library's classes.
        self._transport = cast(asyncio.Transport, transport)
        self.usable = True

    def data_received(self, data: bytes) -> None:
        """Parse a piece of the answer."""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if self.usable:
                self.fail("BadAnswer")

    def eof_received(self) -> bool:
        """Let the transport close."""
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """End the exchange: an answer without a length ends like this, any other is broken off."""
        if not self.usable:
            return
        if self.exchange is not None and self._open_ended and error is None:
            self._finish(False)
        else:
            self.fail("Reset" if isinstance(error, ConnectionResetError) else "Disconnected")

    @property
    def unheard(self) -> bool:
        """Whether it has carried answers before, and not a byte of one for the present exchange."""
        return self.answers > 0 and not self._begun

    # What the parser calls.

    def on_message_begin(self) -> None:
        """An answer begins."""
        self._begun = True
        self._measured = self._open_ended = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep what the load reads."""
        name = name.lower()
        if name in _LENGTHS:
            self._measured = True
        elif name in _WANTED and self.exchange is not None:
            self.exchange.headers[name] = value

    def on_headers_complete(self) -> None:
        """Note whether the answer ends with the connection alone."""
        self._open_ended = not self._measured

    def on_message_complete(self) -> None:
        """The answer is whole; 1xx only announces one."""
        if self._parser.get_status_code() >= 200:
            self._finish(self._parser.should_keep_alive())

    def _finish(self, keep: bool) -> None:
        exchange = self.exchange
        if exchange is None:
            # An answer that nobody asked for, as 408 on an idle connection.
            self.fail("Unasked")
            return
        exchange.end = perf_counter()
        exchange.status = self._parser.get_status_code()
        self.exchange = None
        self.answers += 1
        if not keep:
            self.close()
        self._ended(self, exchange)
