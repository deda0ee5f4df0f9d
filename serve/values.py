"""What a property's value may be: a whole number within a range, or an address."""

from __future__ import annotations

import dataclasses
import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Whole:
    """A whole number from `low` to `high`; `unit` is for the error's sentence."""

    low: int
    high: int
    unit: str

    def check(self, value: object) -> int:
        """Return the number.

        Raises:
            ValueError: with what is allowed.
        """
        if isinstance(value, bool) or not isinstance(value, int) or not self.low <= value <= self.high:
            raise ValueError(f"a whole number of {self.unit}, {self.low} to {self.high}")
        return value

    def parse(self, text: str) -> int:
        """Return the number written in `text`, as `check` does."""
        try:
            value: object = int(text)
        except ValueError:
            value = text
        return self.check(value)


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
