"""Pictures by URL: which URLs are allowed, and fetching one without reaching anything private.

The list of attacks is OWASP's (Server-Side Request Forgery Prevention Cheat Sheet). The last word has the check of the
address that a connection is about to be made to: a name, or a form of an address, may mean another one by then.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from beeline.errors import short
from serve.gateway.settings import Settings

_LONGEST = 2048  # characters of a URL
# IANA's registries of special addresses (RFC 6890), multicast, and the address of Azure's agent. Of IPv6 all but
# 2000::/3, so mapped addresses, NAT64, link-local and unique local ones; and in it what holds an IPv4 address (6to4,
# Teredo) and documentation.
_SPECIAL = """
    0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 168.63.129.16/32 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24
    192.0.2.0/24 192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/3
    ::/3 2001::/23 2001:db8::/32 2002::/16 3fff::/20 4000::/2 8000::/1
"""
_NETWORKS = [ipaddress.ip_network(each) for each in _SPECIAL.split()]


class Refused(Exception):
    """A request that gets an error of this status: `code`, `type` and `message`."""

    def __init__(self, status: int, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.values = status, {"code": status, "type": kind, "message": sentence}


class NotPublic(OSError):
    """An address that no picture is fetched from."""


def is_public(text: str) -> bool:
    """Return whether an IP address is one of the Internet's, and not of this machine, its network or its cloud."""
    address = ipaddress.ip_address(text.partition("%")[0])
    return not any(address in network for network in _NETWORKS)


class Fetcher:
    """Fetches pictures from the hosts that the settings name. Use it in one event loop, and close it."""

    def __init__(
        self, settings: Settings, resolver: AbstractResolver | None = None, public: Callable[[str], bool] = is_public
    ) -> None:
        self.settings = settings

        def connect(found: Any) -> socket.socket:
            family, kind, protocol, _, address = found
            if not public(address[0]):
                raise NotPublic(f"its address {address[0]} is not public")
            return socket.socket(family, kind, protocol)

        # One host may keep at most a fifth of the connections busy. Addresses are tried one after the other.
        connector = aiohttp.TCPConnector(
            limit=100, limit_per_host=20, resolver=resolver, use_dns_cache=False, socket_factory=connect, happy_eyeballs_delay=None
        )
        # It reads no proxy and no password of the environment, keeps no cookies, and unpacks nothing.
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=settings.url_seconds),
            headers={"User-Agent": "beeline", "Accept": "image/*", "Accept-Encoding": "identity"},
            auto_decompress=False,
            trust_env=False,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def fetch(self, text: object, hold: Callable[[int], None]) -> bytes:
        """Return the bytes at a URL; `hold` is called with the size of each piece, before it is kept.

        Raises:
            Refused: 400 for no URL, 403 for one that is not allowed, 413 for too many bytes, 424 if it cannot be had.
        """
        url, name = self._allowed(text)
        try:
            async with self._session.get(url, allow_redirects=False) as response:
                if response.status != 200:
                    moved = ", and redirects are not followed" if 300 <= response.status < 400 else ""
                    raise _not_fetched(f"{name} answers {response.status}{moved}", "give the address of a picture")
                return await self._read(response, hold)
        except NotPublic as error:
            raise _not_allowed(f"{name} is refused, since {error}", "send the picture itself") from error
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, NotPublic):
                raise _not_allowed(f"{name} is refused, since {error.os_error}", "send the picture itself") from error
            raise _not_fetched(
                f"{name} cannot be reached ({short(error)})", "try again, or send the picture"
            ) from error
        except asyncio.TimeoutError as error:
            seconds = f"{self.settings.url_seconds} seconds (beeline_url_seconds)"
            raise _not_fetched(f"{name} has not sent it within {seconds}", "try again, or send the picture") from error
        except aiohttp.InvalidURL as error:
            # Such as a number that C reads as an address.
            raise _bad(text, error) from error
        except (aiohttp.ClientError, ValueError) as error:
            raise _not_fetched(f"{name} breaks off ({short(error)})", "try again, or send the picture") from error

    async def _read(self, response: aiohttp.ClientResponse, hold: Callable[[int], None]) -> bytes:
        most, pieces, size = self.settings.max_image, list[bytes](), response.content_length or 0
        while size <= most and (piece := await response.content.readany()):
            hold(len(piece))
            pieces.append(piece)
            size = max(size, sum(map(len, pieces)))
        if size > most:
            sentence = f"the picture at the URL is over {most} bytes, which is the limit: scale it down or compress it"
            raise Refused(413, "TooManyBytes", sentence)
        return b"".join(pieces)

    def _allowed(self, text: object) -> tuple[URL, str]:
        """Return the URL and its host, for sentences."""
        try:
            if not isinstance(text, str) or len(text) > _LONGEST:
                raise ValueError(f"it has to be a text of at most {_LONGEST} characters")
            url = URL(text.strip())
            if url.user is not None or url.password is not None:
                raise ValueError("it has a user name, and none is sent")
            host = (url.raw_host or "").rstrip(".").lower()
            port = url.port
        except ValueError as error:
            raise _bad(text, error) from error
        schemes = ("https", "http") if self.settings.url_http else ("https",)
        if url.scheme not in schemes:
            raise _not_allowed(
                f"the URL begins with {short(url.scheme or text, 80)!r}", f"allowed: {', '.join(schemes)}"
            )
        name = host if url.is_default_port() else f"{host}:{port}"
        if not any(name == each or (each[0] == "*" and name.endswith(each[1:])) for each in self.settings.url_hosts):
            raise _not_allowed(f"{short(name, 80)!r} is no host of beeline_url_hosts", "send the picture itself")
        return url, name


def _bad(text: object, error: Exception) -> Refused:
    sentence = f'the "url" {short(text, 80)!r} cannot be used ({short(error)}); allowed: https://HOST/PATH'
    return Refused(400, "BadUrl", sentence)


def _not_allowed(what: str, fix: str) -> Refused:
    return Refused(403, "UrlNotAllowed", f"{what}; {fix}")


def _not_fetched(what: str, fix: str) -> Refused:
    return Refused(424, "UrlNotFetched", f"{what}; {fix}")
