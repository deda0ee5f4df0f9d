"""The development proxy's management listener, by the rules of nginx's: to look, and to scale one model."""

from __future__ import annotations

import asyncio
import re

import aiohttp
import aiohttp.web
import yarl

from serve.gateway.refusals import Refusals, Refused, finish

_NAME = "[A-Za-z0-9][A-Za-z0-9_.-]*"
_PATH = re.compile(rf"/models(/{_NAME}(/{_NAME})?)?/?")
_HERE = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.IGNORECASE)
# Bytes of the body, which goes no further; seconds, since scaling may wait for workers to load.
_MOST, _PATIENCE = 1024, 600.0


class Management:
    """Stands before the management API of one server, on loopback.

    Loopback keeps other machines out, but not the web pages that are open on this one: a page may send requests
    to any address, and Multi Model Server registers, and so runs, what a simple one of them names.

    Args:
        control: the URL of the server's own management API.
        refusals: makes the errors.
    """

    def __init__(self, control: str, refusals: Refusals) -> None:
        self._control, self._refusals = control, refusals

    async def answer(self, request: aiohttp.web.BaseRequest) -> aiohttp.web.Response:
        """Answer one request."""
        try:
            self._check(request)
            response = await self._ask(request)
        except Refused as refused:
            response = self._refusals.answer(refused)
        finish(response)
        return response

    def _check(self, request: aiohttp.web.BaseRequest) -> None:
        """Raise `Refused` for what is not let through."""
        if (request.content_length or 0) > _MOST or "Transfer-Encoding" in request.headers:
            raise Refused(413, close=True)
        # Neither decoded nor normalised: a path with an escape or a dot segment is none of these.
        path = request.raw_path.partition("?")[0]
        if not _PATH.fullmatch(path):
            raise Refused(404)
        # Pages say where they are from, and a name that they made point here is not one of this machine's.
        hosts = request.headers.getall("Host", [""])
        if "Origin" in request.headers or not all(_HERE.fullmatch(host) for host in hosts):
            raise Refused(403)
        allowed = ("GET",) if path.rstrip("/") == "/models" else ("GET", "PUT")
        if request.method not in allowed:
            raise Refused(405, ", ".join(allowed))

    async def _ask(self, request: aiohttp.web.BaseRequest) -> aiohttp.web.Response:
        url = yarl.URL(f"{self._control}{request.raw_path}", encoded=True)
        timeout = aiohttp.ClientTimeout(total=_PATIENCE)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.request(request.method, url, headers={"Host": "localhost"}, allow_redirects=False) as answer,
            ):
                kind = {"Content-Type": answer.headers.get("Content-Type", "application/json")}
                return aiohttp.web.Response(status=answer.status, body=await answer.read(), headers=kind)
        except asyncio.TimeoutError:
            raise Refused(504) from None
        except aiohttp.ClientError:
            raise Refused(502) from None
