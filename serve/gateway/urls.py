"""Pictures by URL: which URLs are allowed, and fetching one without reaching anything private.

The attacks are those of OWASP's Server-Side Request Forgery Prevention Cheat Sheet. The check that decides is that of
the address to which a connection is about to be made: by then a name, or another form of an address, means one thing.
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
    """A request that gets an error: its status, its type, and a sentence."""

    def __init__(self, status: int, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.values: dict[str, Any] = {"code": status, "type": kind, "message": sentence}


class NotPublic(OSError):
    """An address that no picture is fetched from."""


def is_public(text: str) -> bool:
    """Return whether an IP address is one of the Internet's, and not of this machine, its network or its cloud."""
    address = ipaddress.ip_address(text.partition("%")[0])
    return not any(address in network for network in _NETWORKS)


class Fetcher:
    """Fetches pictures from the hosts that the settings name. Make it in a running event loop, and close it."""

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
        options: dict[str, Any] = {"limit": 100, "limit_per_host": 20, "happy_eyeballs_delay": None}
        # It reads no proxy and no password of the environment, keeps no cookies, and unpacks nothing.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False, socket_factory=connect, **options),
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
                    raise _refused(424, f"{name} answers {response.status}{moved}; give the address of a picture")
                return await self._read(response, hold)
        except aiohttp.InvalidURL as error:
            # Such as a number that C reads as an address.
            raise _bad(text, error) from error
        except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
            why = f"cannot be asked ({short(error)})"
            if isinstance(cause := getattr(error, "os_error", None), NotPublic):
                raise _refused(403, f"{name} is refused, since {cause}; send the picture itself") from error
            if isinstance(error, asyncio.TimeoutError):
                why = f"has not sent it within {self.settings.url_seconds} seconds (beeline_url_seconds)"
            raise _refused(424, f"{name} {why}; try again, or send the picture itself") from error

    async def _read(self, response: aiohttp.ClientResponse, hold: Callable[[int], None]) -> bytes:
        most, data = self.settings.max_image, bytearray()
        while max(len(data), response.content_length or 0) <= most:
            if not (piece := await response.content.readany()):
                return bytes(data)
            hold(len(piece))
            data += piece
        raise Refused(413, "TooManyBytes", f"the picture at the URL is over {most} bytes, the limit; scale it down")

    def _allowed(self, text: object) -> tuple[URL, str]:
        """Return the URL, and its host for sentences."""
        try:
            if not isinstance(text, str) or len(text) > _LONGEST:
                raise ValueError(f"it has to be a text of at most {_LONGEST} characters")
            url = URL(text.strip())
            if url.user is not None or url.password is not None:
                raise ValueError("it has a user name, and none is sent")
            name = (url.raw_host or "").rstrip(".").lower() + ("" if url.is_default_port() else f":{url.port}")
        except ValueError as error:
            raise _bad(text, error) from error
        schemes = ("https", "http") if self.settings.url_http else ("https",)
        if url.scheme not in schemes:
            raise _refused(403, f"the URL begins with {short(url.scheme, 80)!r}; allowed: {', '.join(schemes)}")
        if not any(name == each or (each[0] == "*" and name.endswith(each[1:])) for each in self.settings.url_hosts):
            raise _refused(403, f"{short(name, 80)!r} is no host of beeline_url_hosts; send the picture itself")
        return url, name


def _bad(text: object, error: Exception) -> Refused:
    sentence = f'the "url" {short(text, 80)!r} cannot be used ({short(error)}); allowed: https://HOST/PATH'
    return Refused(400, "BadUrl", sentence)


def _refused(status: int, sentence: str) -> Refused:
    return Refused(status, "UrlNotAllowed" if status == 403 else "UrlNotFetched", sentence)
