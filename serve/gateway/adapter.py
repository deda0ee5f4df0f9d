"""The adapter: what nginx cannot answer, namely pictures by URL and the KServe protocols.

Run by the gateway as `python -m serve.gateway.adapter FOLDER SOCKET`, where FOLDER is its runtime folder and SOCKET the
number of the open socket that nginx passes such requests to. Predictions go back to nginx, on a socket of its own in
FOLDER, so that its queue, its deadline and its answers hold for them. The plain API never comes here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL

from serve.gateway.runtime import ERRORS, GATEWAY_SOCKET
from serve.gateway.settings import Settings
from serve.gateway.urls import Fetcher, Refused

logger = logging.getLogger("adapter")
# Bytes of a JSON body that may be a URL's. nginx sends longer ones here only if it does not know their length.
_SHORT = 10_000
# Bytes of bodies and fetched pictures that are held at a time.
_HELD = 256_000_000
# Of the gateway's answer, for the client; nginx adds its own to all answers.
_PASSED = ("Content-Type", "X-Batch-Size", "Server-Timing")


class Room:
    """Bytes of bodies and fetched pictures that may be held at a time, of all requests together."""

    def __init__(self, free: int) -> None:
        self.free = free

    @contextmanager
    def share(self) -> Iterator[Share]:
        """Give a request its share; it is free again at the end."""
        share = Share(self)
        try:
            yield share
        finally:
            self.free += share.held


@dataclass
class Share:
    """The bytes that one request holds."""

    room: Room
    held: int = 0

    def take(self, size: int) -> None:
        """Hold more bytes; raise Refused if there is no room for them."""
        if size > self.room.free:
            raise Refused(429, *ERRORS[429])
        self.held += size
        self.room.free -= size


_SHARE = web.RequestKey("share", Share)


@dataclass(frozen=True)
class Answer:
    """What the gateway answered."""

    status: int
    headers: dict[str, str]
    body: bytes


class Adapter:
    """The application for one gateway."""

    def __init__(self, settings: Settings, fetcher: Callable[[Settings], Fetcher] = Fetcher) -> None:
        self.settings = settings
        self._make_fetcher = fetcher
        self._room = Room(max(_HELD, 4 * settings.max_body))

    def application(self) -> web.Application:
        """Return the application for `aiohttp.web`."""
        application = web.Application(client_max_size=self.settings.max_body, middlewares=[self._guard])
        application.cleanup_ctx.append(self._sessions)
        if self.settings.url_hosts:
            application.router.add_route("*", "/{path:.*}", self.pass_on)
        return application

    async def _sessions(self, application: web.Application) -> AsyncIterator[None]:
        # A new connection for each request: nginx closes kept ones when it likes.
        connector = aiohttp.UnixConnector(str(GATEWAY_SOCKET), limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=self.settings.deadline + 2)
        self._fetcher = self._make_fetcher(self.settings)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as self._gateway:
            yield
        await self._fetcher.close()

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Answer errors as the gateway does, and refuse a request for which there is no room."""
        try:
            with self._room.share() as request[_SHARE]:
                request[_SHARE].take(request.content_length or 0)
                return await handler(request)
        except Refused as error:
            status, kind, sentence = error.status, error.kind, str(error)
        except web.HTTPException as error:
            kind, sentence = ERRORS.get(error.status, ERRORS[500])
            status, sentence = error.status, sentence.format(max_image=self.settings.max_image)
        except Exception:
            logger.exception("%s %s failed", request.method, request.path)
            status, (kind, sentence) = 500, ERRORS[500]
        return web.json_response({"code": status, "type": kind, "message": sentence}, status=status)

    async def ask(self, method: str, path: str, body: bytes | None = None, accept: str = "*/*") -> Answer:
        """Send a request to nginx and return its answer, whatever its status is; `path` is encoded."""
        headers = {"Content-Type": "application/octet-stream", "Accept": accept}
        try:
            to = URL(f"http://beeline{path}", encoded=True)
            async with self._gateway.request(method, to, data=body, headers=headers, allow_redirects=False) as response:
                passed = {name: response.headers[name] for name in _PASSED if name in response.headers}
                return Answer(response.status, passed, await response.read())
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            logger.error("nginx does not answer %s %s: %r", method, path, error)
            raise Refused(503, *ERRORS[503]) from error

    async def pass_on(self, request: web.Request) -> web.Response:
        """Answer a prediction: of the picture at the URL in its body, else of the body as it is."""
        body = await request.read()
        if len(body) < _SHORT and (values := _object(body)) is not None and "url" in values:
            body = await self._fetcher.fetch(values["url"], request[_SHARE].take)
        accept = request.headers.get("Accept", "*/*")
        answer = await self.ask(request.method, request.rel_url.raw_path, body, accept)
        return web.Response(status=answer.status, headers=answer.headers, body=answer.body)


def _object(body: bytes) -> dict[str, Any] | None:
    """Return the JSON object that a body is, None if it is none."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def main(arguments: list[str], **options: Any) -> None:
    """Answer on the socket until SIGTERM, then what is under way; `options` are those of `Adapter`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stdout)
    settings = Settings.load(Path(arguments[0]))
    # A socket's path has at most 108 characters; nginx is started here too.
    os.chdir(settings.folder)
    application = Adapter(settings, **options).application()
    listening = socket.socket(fileno=int(arguments[1]))
    web.run_app(application, sock=listening, print=None, access_log=None, shutdown_timeout=settings.stop)


if __name__ == "__main__":
    main(sys.argv[1:])
