"""Addresses with their ports on this machine: a free one, or who holds a taken one."""

from __future__ import annotations

import dataclasses
import errno
import ipaddress
import random
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil

from beeline.errors import BeelineError, Undetermined

# Below Linux's range for outgoing connections, which could take a port between this choice and its use,
# and below 32768: MMS calls anything over that invalid.
_FREE = range(20_000, 32_000)


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
        """Where this machine itself reaches it: an address that stands for all of them is none to connect to."""
        return dataclasses.replace(self, host={"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host))

    @property
    def loopback(self) -> bool:
        """Whether nobody outside this machine reaches it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @classmethod
    def parse(cls, text: str) -> Address:
        """Return the address written in `text`.

        Raises:
            ValueError: with what is allowed.
        """
        try:
            parts = urlsplit(text)
            if (
                parts.scheme not in ("http", "https")
                or not parts.hostname
                or parts.port is None
                or parts.path not in ("", "/")
            ):
                raise ValueError
        except ValueError:
            raise ValueError("http://HOST:PORT, such as http://127.0.0.1:8080") from None
        return cls(parts.hostname, parts.port, parts.scheme)


def settle(wanted: Iterable[tuple[Address, str]], highest: int = 65_535) -> list[Address]:
    """Return the addresses with every port of 0 replaced by a free one.

    Args:
        wanted: each address with the option that changes it.
        highest: the largest port that the server takes.

    Raises:
        BeelineError: when a port is taken, naming it and the process that holds it, or is over `highest`.
        Undetermined: when an address cannot be listened on at all.
    """
    held: list[socket.socket] = []
    settled = []
    try:
        for address, option in wanted:
            if address.port > highest:
                raise BeelineError(
                    f"port {address.port} is over {highest}, this server's last; choose another with {option}"
                )
            port = _free(address, held) if address.port == 0 else _hold(address, option, held)
            settled.append(dataclasses.replace(address, port=port))
        return settled
    finally:
        # All of them stay bound until the last is settled, so that no two are the same.
        for listener in held:
            listener.close()


def _hold(address: Address, option: str, held: list[socket.socket]) -> int:
    try:
        held.append(_listen(address.host, address.port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise BeelineError(
                f"port {address.port} is taken by {holder(address.port)}; "
                f"stop that, or choose another port with {option} (0 for a free one)"
            ) from error
        raise Undetermined(
            f"cannot listen on {address} ({error.strerror or error}); choose another with {option}"
        ) from error
    return address.port


def _free(address: Address, held: list[socket.socket]) -> int:
    candidates = list(_FREE)
    random.shuffle(candidates)
    for port in candidates:
        try:
            held.append(_listen(address.host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                continue
            raise Undetermined(f"cannot listen on {address.host} ({error.strerror or error}); use 127.0.0.1") from error
        return port
    raise Undetermined(f"no port from {_FREE.start} to {_FREE.stop - 1} is free on {address.host}; name one")


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        # As Java does: a port that only lingers from closed connections is free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1)
    except OSError:
        listener.close()
        raise
    return listener


def holder(port: int) -> str:
    """Describe the process that listens on `port`, as well as this user may know it."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.Error:
        return "another process"
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
            if connection.pid is None:
                return "a process of another user"
            try:
                process = psutil.Process(connection.pid)
                return f"{process.name()} (pid {process.pid})"
            except psutil.Error:
                return f"a process that just ended (pid {connection.pid})"
    return "another process"
