"""A web of pictures on loopback, and an adapter for which its addresses are the Internet's.

Run as `python -m tests.serve.gateway.fake_web FOLDER` for a gateway with this adapter, FOLDER as for `serve.gateway`.
Every name means 127.0.0.1, which counts as public; `private.test` means 127.0.0.2, which does not.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult

from serve.gateway import __main__ as gateway
from serve.gateway import adapter
from serve.gateway.settings import Settings
from serve.gateway.urls import Fetcher
from tests.conftest import RED
from tests.serve.gateway.conftest import _Handler, _serve


class Names(AbstractResolver):
    """A fake DNS: what `addresses` says for a name, each time it is asked."""

    def __init__(self, addresses: Callable[[str], list[str]]) -> None:
        self.addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = []
        for address in self.addresses(host):
            kind = socket.AF_INET6 if ":" in address else socket.AF_INET
            found.append(ResolveResult(hostname=host, host=address, port=port, family=kind, proto=0, flags=0))
        return found

    async def close(self) -> None:
        """Do nothing."""


def fetcher(settings: Settings) -> Fetcher:
    names = Names(lambda host: ["127.0.0.2" if host == "private.test" else "127.0.0.1"])
    return Fetcher(settings, names, public=lambda address: address == "127.0.0.1")


class _Pictures(_Handler):
    """The path says what to do: `slow` and `drip` last until `released`; anything else is a red picture."""

    def do_GET(self) -> None:  # noqa: N802
        self.owner.seen.append(self.path)
        self.owner.headers.append(dict(self.headers))
        what, _, value = self.path.strip("/").partition("/")
        if what == "status":
            self.send(int(value), b"no picture", {"Location": self.owner.target})
        elif what == "length":
            self.send(200, b"", {"Content-Length": value})
        elif what == "cut":
            self.send(200, RED[:40], {"Content-Length": str(len(RED))})
        elif what == "packed":
            self.send(200, b"\x1f\x8b packed", {"Content-Encoding": "gzip"})
        elif what in ("endless", "drip"):
            self.stream(what == "drip")
        elif what == "words":
            self.send(200, value.replace("_", " ").encode(), {})
        else:
            if what == "slow":
                self.owner.released.wait(30)
            self.send(200, RED, {"Set-Cookie": "a=b"})
        self.close_connection = True

    def stream(self, drips: bool) -> None:
        self.send_response(200)
        self.end_headers()
        while not self.owner.released.wait(0.1 if drips else 0):
            try:
                self.wfile.write(bytes(1 if drips else 65_536))
            except OSError:
                self.owner.broken.set()
                return


class Web:
    """The server of the pictures, on a port of 127.0.0.1, and what must not be reached, on that port of 127.0.0.2."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.released, self.broken = threading.Event(), threading.Event()
        self.server: Any = _serve(self, _Pictures, 0)  # type: ignore[arg-type]
        self.port = self.server.server_port
        self.other = _serve(self, _Pictures, self.port, "127.0.0.2")  # type: ignore[arg-type]
        self.target = f"http://private.test:{self.port}/secret"

    def url(self, path: str, name: str = "pictures.test") -> str:
        return f"http://{name}:{self.port}/{path}"

    def stop(self) -> None:
        self.released.set()
        self.server.stop()
        self.other.stop()


if __name__ == "__main__":
    if sys.argv[1] == adapter.__name__:
        adapter.main(sys.argv[2:], fetcher=fetcher)
    else:
        gateway.Adapter.command = (sys.executable, "-m", "tests.serve.gateway.fake_web", adapter.__name__)
        sys.exit(gateway.main(sys.argv[1:]))
