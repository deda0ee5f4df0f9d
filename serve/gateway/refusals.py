"""The development proxy's own answers, and its HTTP: what cannot be read is answered in JSON like every other error."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp.web

from serve.gateway import errors

logger = logging.getLogger(__name__)
JSON = {"Content-Type": "application/json"}
_SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Server": "beeline",
}
_RETRY_AFTER = {429: "1", 503: "2"}
# Seconds to read on after a refusal so that its sender hears of it.
_LINGER = 2.0

Answer = Callable[[aiohttp.web.BaseRequest], Awaitable[aiohttp.web.Response]]


class Refused(Exception):
    """An error of the gateway's own with this status; `allowed` is for 405, `close` ends the connection."""

    def __init__(self, status: int, allowed: str = "", close: bool = False) -> None:
        super().__init__(status)
        self.status, self.allowed, self.close = status, allowed, close


class Refusals:
    """Makes the answers.

    Args:
        max_image: bytes of the largest picture, for the error's sentence.
        deadline: seconds for one prediction, for the error's sentence.
    """

    def __init__(self, max_image: int, deadline: float) -> None:
        self._max_image, self._deadline = max_image, math.ceil(deadline)

    def answer(self, refused: Refused) -> aiohttp.web.Response:
        """Return the answer of a refusal."""
        text = errors.body(refused.status, self._max_image, self._deadline)
        allowed = {"Allow": refused.allowed} if refused.allowed else {}
        response = aiohttp.web.Response(status=refused.status, text=text, headers={**JSON, **allowed})
        if refused.close:
            response.force_close()
        return response


def finish(response: aiohttp.web.Response) -> None:
    """Add the headers that every answer has."""
    response.headers.update(_SECURITY)
    if response.status in _RETRY_AFTER:
        response.headers["Retry-After"] = _RETRY_AFTER[response.status]


class Listener(aiohttp.web.Server):
    """Speaks HTTP, and has each request answered by `answer`."""

    def __init__(self, answer: Answer, refusals: Refusals) -> None:
        options: dict[str, Any] = {"auto_decompress": False, "lingering_time": _LINGER, "access_log": None}
        super().__init__(answer, handler_cancellation=True, **options)
        self._refusals = refusals

    def __call__(self) -> aiohttp.web.RequestHandler:
        """Return what speaks on one connection."""
        return _Connection(self._refusals, self, loop=self._loop, **self._kwargs)


class _Connection(aiohttp.web.RequestHandler):
    def __init__(self, refusals: Refusals, server: aiohttp.web.Server, **options: Any) -> None:
        super().__init__(server, **options)
        self._refusals = refusals

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
        response = self._refusals.answer(Refused(status if status in errors.STATUSES else 400, close=True))
        finish(response)
        return response
