"""The development proxy: page and API from one origin on a machine without nginx, by nginx's rules."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import aiohttp.web

from beeline.errors import Undetermined
from serve.gateway import files
from serve.gateway.exchange import Exchange
from serve.gateway.managing import Management
from serve.gateway.passing import Servers
from serve.gateway.refusals import JSON, Answer, Listener, Refusals, Refused, finish

_PREDICTION = re.compile(r"/predictions/([A-Za-z0-9][A-Za-z0-9_.-]*)(?:/([A-Za-z0-9][A-Za-z0-9_.-]*))?")
# Seconds: between two pieces of a body, to connect to a backend.
_PAUSE, _CONNECT = 10.0, 2.0


class Development:
    """A proxy with nginx's routes and limits, those of one address and of the disk aside; on loopback, for one machine.

    Args:
        listen: hosts and ports; a port of 0 takes a free one.
        backends: asked for each request for the URLs of the servers that are ready.
        web: document root: index.html, style.css, scripts/, catalog.json, catalog/, samples/.
        ready: a file that is there only while a server is ready; its text is `/ping`'s answer then.
        unready: the answer of `/ping` otherwise.
        max_bytes: of the largest body.
        in_flight: predictions that each backend holds at most.
        deadline: seconds for one prediction, from its last byte to its answer.
        access_log: gets a line of JSON a request.
        max_image: bytes of the largest picture, for the error's sentence. [max_bytes]
        opened: a file that is there only while predictions are let through. [ready]
        closed: a folder with a file `MODEL@VERSION` for each prediction that is not let through all the same.
        stop: seconds for what is on its way when it ends.
        management: host and port of its management listener. [none]
        control: the URL of the management API that this stands before.
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
        closed: Path | None = None,
        stop: float = 7.0,
        management: tuple[str, int] | None = None,
        control: str = "",
    ) -> None:
        self.listen, self.access_log = listen, access_log
        self.web, self.ready, self.unready = web, ready, unready
        self.opened, self.closed = opened or ready, closed
        self.max_bytes, self.deadline = max_bytes, deadline
        self._refusals = Refusals(max_bytes if max_image is None else max_image, deadline)
        self._servers = Servers(backends, in_flight)
        self._management, self._control = management, control
        self._grace = stop
        self._here = 0
        self._runner: aiohttp.web.ServerRunner | None = None
        self._manager: aiohttp.web.ServerRunner | None = None
        self._session: aiohttp.ClientSession | None = None

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Where it listens, once it was started."""
        return [] if self._runner is None else [(address[0], address[1]) for address in self._runner.addresses]

    @property
    def managed(self) -> tuple[str, int] | None:
        """Where its management listener is, once it was started."""
        return None if self._manager is None else self._manager.addresses[0][:2]

    async def start(self) -> None:
        """Listen.

        Raises:
            Undetermined: when an address cannot be had.
        """
        # A connection a request: a kept one may be closed by its server at the moment that it is used.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)
        self._runner = await self._listen(self.answer, self.listen)
        if self._management is not None:
            manage = Management(self._control, self._refusals).answer
            self._manager = await self._listen(manage, (self._management,))

    async def _listen(self, answer: Answer, at: Sequence[tuple[str, int]]) -> aiohttp.web.ServerRunner:
        runner = aiohttp.web.ServerRunner(Listener(answer, self._refusals), shutdown_timeout=self._grace)
        await runner.setup()
        for host, port in at:
            try:
                await aiohttp.web.TCPSite(runner, host, port, backlog=1024).start()
            except OSError as error:
                await runner.cleanup()
                await self.stop()
                why = error.strerror or str(error)
                raise Undetermined(f"{host}:{port} cannot be listened on ({why}); choose another address") from error
        return runner

    async def stop(self) -> None:
        """Take no more requests, wait a few seconds for those on their way, end."""
        await asyncio.gather(*(each.cleanup() for each in (self._manager, self._runner) if each is not None))
        if self._session is not None:
            await self._session.close()
        self._runner = self._manager = self._session = None

    async def answer(self, request: aiohttp.web.BaseRequest) -> aiohttp.web.Response:
        """Answer one request, and log it."""
        exchange, response = Exchange(request), None
        try:
            response = await self._route(exchange)
        except Refused as refused:
            response = self._refusals.answer(refused)
        except Exception:
            exchange.status = 500
            raise
        finally:
            if response is not None:
                exchange.status = response.status
                finish(response)
            # Health checks ask for nothing else.
            if self.access_log is not None and request.raw_path != "/ping":
                with self.access_log.open("a", encoding="utf-8") as log:
                    log.write(exchange.line(response))
        return response

    async def _route(self, exchange: Exchange) -> aiohttp.web.Response:
        # Neither decoded nor normalised: a path with an escape or a dot segment matches nothing below.
        path, method = exchange.request.raw_path.partition("?")[0], exchange.request.method
        if prediction := _PREDICTION.fullmatch(path):
            if method not in ("POST", "PUT"):
                raise Refused(405, "POST, PUT")
            self._check_open(*prediction.groups(default=""))
            return await self._predict(exchange, path)
        if path != "/ping" and not files.served(path):
            raise Refused(404)
        if method not in ("GET", "HEAD"):
            raise Refused(405, "GET, HEAD")
        if path == "/ping":
            return self._ping()
        found = await asyncio.to_thread(files.read, self.web, path)
        if found is None:
            raise Refused(404)
        return found

    def _check_open(self, model: str, version: str) -> None:
        closed = self.closed is not None and (self.closed / f"{model}@{version}").is_file()
        if closed or not self.opened.is_file():
            raise Refused(503)

    def _ping(self) -> aiohttp.web.Response:
        for status, file in ((200, self.ready), (503, self.unready)):
            with contextlib.suppress(FileNotFoundError):
                return aiohttp.web.Response(
                    status=status, text=file.read_text(encoding="utf-8"), headers={**JSON, **files.FRESH}
                )
        raise Refused(503)

    async def _predict(self, exchange: Exchange, path: str) -> aiohttp.web.Response:
        # Requests that still arrive count here too: as many again as the servers hold.
        if self._here >= 2 * self._servers.places * max(1, len(self._servers.members())):
            raise Refused(429)
        self._here += 1
        try:
            body = await self._body(exchange)
            assert self._session is not None
            # Whoever hangs up has a place in the server's queue all the same, until that has answered.
            ask = self._servers.ask(self._session, exchange, path, body)
            asked = asyncio.ensure_future(asyncio.wait_for(ask, self.deadline))
            asked.add_done_callback(_forget)
            try:
                return await asyncio.shield(asked)
            except asyncio.TimeoutError:
                raise Refused(504) from None
        finally:
            self._here -= 1

    async def _body(self, exchange: Exchange) -> bytes:
        """Read a body to its end: a slow client holds none of a server's places."""
        request, body = exchange.request, bytearray()
        if (request.content_length or 0) > self.max_bytes:
            raise Refused(413, close=True)
        if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            while piece := await asyncio.wait_for(request.content.readany(), _PAUSE):
                body += piece
                exchange.bytes_in = len(body)
                if len(body) > self.max_bytes:
                    raise Refused(413, close=True)
        except asyncio.TimeoutError:
            raise Refused(408, close=True) from None
        except (aiohttp.web.RequestPayloadError, ConnectionError):
            raise Refused(400, close=True) from None
        return bytes(body)


def _forget(asked: asyncio.Future[Any]) -> None:
    """Where nobody waits for an answer any more, its error is nobody's."""
    if not asked.cancelled():
        asked.exception()
