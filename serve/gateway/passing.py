"""Predictions passed on to the servers by the development proxy: which one, how many at once, what goes further."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence

import aiohttp
import aiohttp.web

from serve.gateway.exchange import Exchange
from serve.gateway.refusals import Refused

# What belongs to one connection, or is said anew here.
_NOT_PASSED_BACK = {
    "connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "content-length", "date", "server",
}  # fmt: skip


class Servers:
    """The servers that are ready, each with as many places as it may have requests.

    Args:
        members: asked for each request for their URLs.
        places: of each.
    """

    def __init__(self, members: Callable[[], Sequence[str]], places: int) -> None:
        self.members, self.places = members, places
        self._held: Counter[str] = Counter()
        self._turn = 0

    async def ask(
        self, session: aiohttp.ClientSession, exchange: Exchange, path: str, body: bytes
    ) -> aiohttp.web.Response:
        """Ask one after the other until one answers: a prediction has no side effect.

        Raises:
            Refused: 503 where none is ready, 429 where all places are taken, 502 where connections broke.
        """
        members = list(self.members())
        if not members:
            raise Refused(503)
        self._turn += 1
        tried: set[str] = set()
        while (server := self._free(members, tried)) is not None:
            tried.add(server)
            exchange.backends.append(server.removeprefix("http://"))
            self._held[server] += 1
            try:
                return await self._once(session, exchange, f"{server}{path}", body)
            except aiohttp.ClientConnectionError:
                continue
            except aiohttp.ClientError:
                break
            finally:
                self._held[server] -= 1
        raise Refused(502 if tried >= set(members) or server is not None else 429)

    def _free(self, members: Sequence[str], tried: Collection[str]) -> str | None:
        """Return the server with the fewest requests that has a place, in turn where several have."""
        first = self._turn % len(members)
        free = [
            one for one in (*members[first:], *members[:first]) if one not in tried and self._held[one] < self.places
        ]
        return min(free, key=lambda one: self._held[one], default=None)

    async def _once(
        self, session: aiohttp.ClientSession, exchange: Exchange, url: str, body: bytes
    ) -> aiohttp.web.Response:
        # Nothing that a client says goes further but Accept; Content-Length is made anew from the body. Whatever that
        # is called: the servers' front ends would take forms apart; see nginx's configuration.
        headers = {
            "Content-Type": "application/octet-stream",
            "Host": "beeline",
            "X-Request-Id": exchange.id,
            "X-Request-Start": f"t={time.time():.3f}",
        }
        if (accept := exchange.request.headers.get("Accept")) is not None:
            headers["Accept"] = accept
        answer = await session.request(
            exchange.request.method,
            url,
            data=body,
            headers=headers,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            allow_redirects=False,
        )
        try:
            data = await answer.read()
        except aiohttp.ClientConnectionError as error:
            # It was begun: nobody else is asked.
            raise aiohttp.ClientPayloadError from error
        exchange.answered = True
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in _NOT_PASSED_BACK}
        return aiohttp.web.Response(status=answer.status, reason=answer.reason or None, body=data, headers=kept)
