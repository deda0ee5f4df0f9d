"""Addresses on this machine: free ports, and who holds a taken one."""

from __future__ import annotations

import dataclasses
import errno
import ipaddress
import random
import socket
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil

from beeline.errors import BeelineError, Undetermined

# Below Linux's range for outgoing connections, which could take the port before the server does, and below 32768,
# because MMS refuses higher ports.
FREE = range(20_000, 32_000)


@dataclass(frozen=True)
class Address:
    """`http://host:port`, or `https`; a port of 0 asks for a free one."""

    host: str
    port: int
    scheme: str = "http"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    @property
    def local(self) -> Address:
        """The address to use on this machine: nothing can connect to 0.0.0.0."""
        return dataclasses.replace(self, host={"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host))

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @classmethod
    def parse(cls, text: str) -> Address:
        """Return the address written in `text`; raise ValueError with what is allowed."""
        # A port that is not a number raises here.
        with suppress(ValueError):
            parts = urlsplit(text)
            is_plain = parts.scheme in ("http", "https") and parts.path in ("", "/")
            if is_plain and parts.hostname and parts.port is not None:
                return cls(parts.hostname, parts.port, parts.scheme)
        raise ValueError("http://HOST:PORT, such as http://127.0.0.1:8080")


def settle(wanted: Iterable[tuple[Address, str]], highest: int = 65_535, free: range = FREE) -> list[Address]:
    """Return the addresses with a port of `free` for each 0; `wanted` gives with each the option that changes it.

    Raises:
        BeelineError: if a port is over `highest`, or is taken; with the process that holds it.
        Undetermined: if nothing can listen on an address.
    """
    settled = []
    # All stay bound until the last is settled, so that no two are the same.
    with ExitStack() as held:
        for address, option in wanted:
            if address.port > highest:
                raise BeelineError(
                    f"port {address.port} is over {highest}, this server's last; choose another with {option}"
                )
            for port in random.sample(free, len(free)) if address.port == 0 else [address.port]:
                try:
                    # It sets SO_REUSEADDR, as Java does: a port with nothing but closed connections is free.
                    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
                    held.enter_context(socket.create_server((address.host, port), family=family, backlog=1))
                except OSError as error:
                    if error.errno != errno.EADDRINUSE:
                        raise Undetermined(
                            f"cannot listen on {address} ({error.strerror or error}); choose another with {option}"
                        ) from error
                    continue
                settled.append(dataclasses.replace(address, port=port))
                break
            else:
                raise BeelineError(
                    f"port {address.port} is taken by {holder(address.port)}; "
                    f"stop that, or choose another port with {option} (0 for a free one)"
                )
    return settled


def holder(port: int) -> str:
    """Describe the process that listens on `port`, as far as this user may know it."""
    with suppress(psutil.Error):
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
                if connection.pid is None:
                    return "a process of another user"
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return "another process"
