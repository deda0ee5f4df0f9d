"""A load to make: where to, which pictures, how many clients or arrivals a second, how long."""

from __future__ import annotations

import mimetypes
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

from beeline.errors import ConfigError
from bench.pictures import Pictures


def content_type(name: str) -> str:
    """Return what a picture of that file name is sent as."""
    return mimetypes.guess_type(name)[0] or "application/octet-stream"


@dataclass(frozen=True)
class Plan:
    """One load.

    Attributes:
        url: the full address, as in `http://127.0.0.1:8080/predictions/resnet18`.
        pictures: sent in turn, in an order shuffled by the seed.
        seconds: how long is measured.
        warm_up: seconds of the same load before that, not counted.
        clients: closed loop: so many keep-alive connections, each of which sends again when it has its answer.
        rate: open loop: arrivals a second, whatever the server does. Exactly one of the two.
        poisson: whether arrivals come at random, as from many independent people, or evenly.
        deadline: seconds after its start (the intended one, in open loop) at which a request has failed.
        seed: of the pictures' order and the arrivals.
        most_connections: open loop: connections at once at most; an arrival that finds none waits, and its
            time counts.
        headers: of each request, beside or instead of `Content-Type`, which goes by the picture's name.
        heed_retry_after: closed loop: a client waits after a 429 as that says, instead of asking again at once.
    """

    url: str
    pictures: Pictures
    seconds: float = 10.0
    warm_up: float = 2.0
    clients: int | None = None
    rate: float | None = None
    poisson: bool = True
    deadline: float = 60.0
    seed: int = 0
    most_connections: int = 512
    headers: Mapping[str, str] = field(default_factory=dict)
    heed_retry_after: bool = False

    def __post_init__(self) -> None:
        """Check every number.

        Raises:
            ConfigError: naming the one that is impossible.
        """
        if (self.clients is None) == (self.rate is None):
            raise ConfigError("a load needs either clients (closed loop) or a rate (open loop), exactly one of them")
        for name in ("clients", "rate", "seconds", "deadline", "most_connections"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} is {value:g}; give more than 0")
        if self.warm_up < 0:
            raise ConfigError(f"warm_up is {self.warm_up:g}; give 0 or more seconds")
        if self.parts.scheme not in ("http", "https") or not self.parts.hostname:
            raise ConfigError(f"the URL is {self.url!r}; give one like http://127.0.0.1:8080/predictions/NAME")

    @property
    def mode(self) -> str:
        """`closed` or `open`."""
        return "closed" if self.rate is None else "open"

    @property
    def parts(self) -> SplitResult:
        """The URL's parts."""
        return urlsplit(self.url)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        return self.parts.hostname or "", self.parts.port or (443 if self.parts.scheme == "https" else 80)

    @property
    def path(self) -> str:
        """What a request asks for: path and query."""
        return (self.parts.path or "/") + (f"?{self.parts.query}" if self.parts.query else "")

    def requests(self) -> list[bytes]:
        """Return each picture's whole request, ready to be written, in the order in which they are sent."""
        ready = []
        for name, body in zip(self.pictures.names, self.pictures.bodies, strict=True):
            headers = {
                "Host": self.parts.netloc.rpartition("@")[2],
                "User-Agent": "beeline-bench",
                "Accept": "*/*",
                "Content-Type": content_type(name),
                **self.headers,
                "Content-Length": str(len(body)),
            }
            lines = [f"POST {self.path} HTTP/1.1", *(f"{key}: {value}" for key, value in headers.items())]
            ready.append("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)
        random.Random(self.seed).shuffle(ready)
        return ready
