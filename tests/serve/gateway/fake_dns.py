"""A gateway with a fake DNS: one name has the addresses in a file.

Run as `python -m tests.serve.gateway.fake_dns NAME FILE FOLDER`, FOLDER as for `serve.gateway`. The file has an address
a line; in an empty file the name does not exist; with `away` DNS does not answer.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serve.gateway.__main__ import main


def fake_getaddrinfo(name: str, file: Path) -> Callable[..., Any]:
    """Return a replacement for `socket.getaddrinfo`."""
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
        if host != name:
            return real(host, *arguments, **options)
        addresses = file.read_text().split()
        if addresses == ["away"]:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [found for address in addresses for found in real(address, *arguments, **options)]

    return getaddrinfo


if __name__ == "__main__":
    socket.getaddrinfo = fake_getaddrinfo(sys.argv[1], Path(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
