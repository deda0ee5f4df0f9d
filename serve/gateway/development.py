"""The development proxy: page and API from one origin on a machine without nginx, by nginx's rules."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import aiohttp.web

from beeline.errors import Undetermined
from serve.gateway import errors, files
from serve.gateway.exchange import Exchange

logger = logging.getLogger(__name__)

_PREDICTION = re.compile(r"/predictions/[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?")
_JSON = {"Content-Type": "application/json"}
# Nothing else that a client says goes further; Content-Length is made anew from the body.
_PASSED_ON = ("Content-Type", "Accept")
_SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Server": "beeline",
}
_RETRY_AFTER = {429: "1", 503: "2"}
# What belongs to one connection, or is said anew here.
_NOT_PASSED_BACK = {
    "connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "content-length", "date", "server",
}  # fmt: skip
# Seconds: between two pieces of a body, to read on after a refusal so that its sender hears of it, to
# connect to a backend, for what is on its way at the end.
_PAUSE, _LINGER, _CONNECT = 10.0, 2.0, 2.0


class _Refused(Exception):
    """The gateway's own answer: an error with this status; `allowed` is for 405, `close` ends the connection."""

    def __init__(self, status: int, allowed: str = "", close: bool = False) -> None:
        super().__init__(status)
        self.status, self.allowed, self.close = status, allowed, close


class Development:
    """A proxy with nginx's routes and limits; on loopback, for one machine.

    Args:
        listen: hosts and ports; a port of 0 takes a free one.
        backends: asked for each request for the URLs of the servers that are ready.
        web: document root: index.html, style.css, scripts/, catalog.json, catalog/, samples/.
        ready: a file that is there only while a server is ready; its text is `/ping`'s answer then.
        unready: the answer of `/ping` otherwise.
        max_bytes: of the largest body.
        in_flight: predictions that the backends hold at most, together.
        deadline: seconds for one prediction, from its last byte to its answer.
        access_log: gets a line of JSON a request.
        max_image: bytes of the largest picture, for the error's sentence. [max_bytes]
        opened: a file that is there only while predictions are let through. [ready]
        stop: seconds for what is on its way when it ends.
    """

    def __init__(
        self,
        listen: tuple[tuple[str, int], ...],
        backends: Callable[[], Sequence[str]],
        web: Path,
        ready: Path,
        unready: Path,
        max_bytes: int,
        in_flight: int,
        deadline: float,
        access_log: Path | None = None,
        max_image: int | None = None,
        opened: Path | None = None,
        stop: float = 7.0,
    ) -> None:
        self.listen, self.backends, self.access_log = listen, backends, access_log
        self.web, self.ready, self.unready, self.opened = web, ready, unready, opened or ready
        self.max_bytes, self.in_flight, self.deadline = max_bytes, in_flight, deadline
        self._max_image = max_bytes if max_image is None else max_image
        self._grace = stop
        self._here = self._held = self._turn = 0
        self._runner: aiohttp.web.ServerRunner | None = None
        self._session: aiohttp.ClientSession | None = None

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Where it listens, once it was started."""
        return [] if self._runner is None else [(address[0], address[1]) for address in self._runner.addresses]

    async def start(self) -> None:
        """Listen.

        Raises:
            Undetermined: when an address cannot be had.
        """
        # A connection a request: a kept one may be closed by its server at the moment that it is used.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)
        options = {"auto_decompress": False, "lingering_time": _LINGER, "access_log": None}
        server = _Server(self, handler_cancellation=True, **options)
        self._runner = aiohttp.web.ServerRunner(server, shutdown_timeout=self._grace)
        await self._runner.setup()
        for host, port in self.listen:
            try:
                await aiohttp.web.TCPSite(self._runner, host, port, backlog=1024).start()
            except OSError as error:
                await self.stop()
                why = error.strerror or str(error)
                raise Undetermined(f"{host}:{port} cannot be listened on ({why}); choose another address") from error

    async def stop(self) -> None:
        """Take no more requests, wait a few seconds for those on their way, end."""
        if self._runner is not None:
            await self._runner.cleanup()
        if self._session is not None:
            await self._session.close()
        self._runner = self._session = None

    async def answer(self, request: aiohttp.web.BaseRequest) -> aiohttp.web.Response:
        """Answer one request, and log it."""
        exchange, response = Exchange(request), None
        try:
            response = await self._route(exchange)
        except _Refused as refused:
            response = self.error(refused.status, refused.allowed)
            if refused.close:
                response.force_close()
        except Exception:
            exchange.status = 500
            raise
        finally:
            if response is not None:
                exchange.status = response.status
                response.headers.update(_SECURITY)
                if response.status in _RETRY_AFTER:
                    response.headers["Retry-After"] = _RETRY_AFTER[response.status]
            if self.access_log is not None:
                with self.access_log.open("a", encoding="utf-8") as log:
                    log.write(exchange.line(response))
        return response

    def error(self, status: int, allowed: str = "") -> aiohttp.web.Response:
        """Return an error of the gateway's own."""
        text = errors.body(status, self._max_image, math.ceil(self.deadline))
        return aiohttp.web.Response(
            status=status, text=text, headers={**_JSON, **({"Allow": allowed} if allowed else {})}
        )

    async def _route(self, exchange: Exchange) -> aiohttp.web.Response:
        # Neither decoded nor normalised: a path with an escape or a dot segment matches nothing below.
        path, method = exchange.request.raw_path.partition("?")[0], exchange.request.method
        if _PREDICTION.fullmatch(path):
            if method not in ("POST", "PUT"):
                raise _Refused(405, "POST, PUT")
            return await self._predict(exchange, path)
        if path != "/ping" and not files.served(path):
            raise _Refused(404)
        if method not in ("GET", "HEAD"):
            raise _Refused(405, "GET, HEAD")
        if path == "/ping":
            return self._ping()
        found = await asyncio.to_thread(files.read, self.web, path)
        if found is None:
            raise _Refused(404)
        return found

    def _ping(self) -> aiohttp.web.Response:
        for status, file in ((200, self.ready), (503, self.unready)):
            with contextlib.suppress(FileNotFoundError):
                return aiohttp.web.Response(
                    status=status, text=file.read_text(encoding="utf-8"), headers={**_JSON, **files.FRESH}
                )
        raise _Refused(503)

    async def _predict(self, exchange: Exchange, path: str) -> aiohttp.web.Response:
        if not self.opened.is_file():
            raise _Refused(503)
        # Requests that still arrive count here too: as many again as the servers hold.
        if self._here >= 2 * self.in_flight:
            raise _Refused(429)
        self._here += 1
        try:
            body = await self._body(exchange)
            if self._held >= self.in_flight:
                raise _Refused(429)
            self._held += 1
            # Whoever hangs up has a place in the server's queue all the same, until that has answered.
            asked = asyncio.ensure_future(asyncio.wait_for(self._forward(exchange, path, body), self.deadline))
            asked.add_done_callback(self._release)
            try:
                return await asyncio.shield(asked)
            except asyncio.TimeoutError:
                raise _Refused(504) from None
        finally:
            self._here -= 1

    def _release(self, asked: asyncio.Future[Any]) -> None:
        self._held -= 1
        # Where nobody waits for it any more, its error is nobody's.
        if not asked.cancelled():
            asked.exception()

    async def _body(self, exchange: Exchange) -> bytes:
        """Read a body to its end: a slow client holds none of a server's places."""
        request, body = exchange.request, bytearray()
        if (request.content_length or 0) > self.max_bytes:
            raise _Refused(413, close=True)
        if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            while piece := await asyncio.wait_for(request.content.readany(), _PAUSE):
                body += piece
                exchange.bytes_in = len(body)
                if len(body) > self.max_bytes:
                    raise _Refused(413, close=True)
        except asyncio.TimeoutError:
            raise _Refused(408, close=True) from None
        except (aiohttp.web.RequestPayloadError, ConnectionError):
            raise _Refused(400, close=True) from None
        return bytes(body)

    async def _forward(self, exchange: Exchange, path: str, body: bytes) -> aiohttp.web.Response:
        """Ask the servers in turn until one answers: a prediction has no side effect."""
        assert self._session is not None
        servers = list(self.backends())
        if not servers:
            raise _Refused(503)
        self._turn += 1
        headers = {name: value for name in _PASSED_ON if (value := exchange.request.headers.get(name)) is not None}
        if headers.get("Content-Type", "").lower().startswith("application/x-www-form-urlencoded"):
            # What curl calls a body that it was not told the type of; the servers would try to read a form in it.
            headers["Content-Type"] = "application/octet-stream"
        headers |= {"Host": "beeline", "X-Request-Id": exchange.id}
        for index in range(len(servers)):
            server = servers[(self._turn + index) % len(servers)]
            exchange.backends.append(server.removeprefix("http://"))
            headers["X-Request-Start"] = f"t={time.time():.3f}"
            ask = self._session.request(
                exchange.request.method,
                f"{server}{path}",
                data=body,
                headers=headers,
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
                allow_redirects=False,
            )
            try:
                answer = await ask
            except aiohttp.ClientConnectionError:
                continue
            except aiohttp.ClientError:
                break
            try:
                data = await answer.read()
            except aiohttp.ClientError:
                break
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in _NOT_PASSED_BACK}
            return aiohttp.web.Response(status=answer.status, reason=answer.reason or None, body=data, headers=kept)
        raise _Refused(502)


class _Server(aiohttp.web.Server):
    """Speaks HTTP for a proxy; what is no proper HTTP is answered like every other error."""

    def __init__(self, proxy: Development, **options: Any) -> None:
        super().__init__(proxy.answer, **options)
        self._proxy = proxy

    def __call__(self) -> aiohttp.web.RequestHandler:
        return _Connection(self._proxy, self, loop=self._loop, **self._kwargs)


class _Connection(aiohttp.web.RequestHandler):
    def __init__(self, proxy: Development, server: aiohttp.web.Server, **options: Any) -> None:
        super().__init__(server, **options)
        self._proxy = proxy

    def handle_error(
        self,
        request: aiohttp.web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> aiohttp.web.StreamResponse:
        """Answer 400 to what cannot be read, 500 to a mistake of the proxy's own."""
        if status >= 500:
            logger.error("the development proxy failed at %s", request.raw_path, exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer was begun already")
        response = self._proxy.error(status if status in errors.STATUSES else 400)
        response.headers.update(_SECURITY)
        response.force_close()
        return response
