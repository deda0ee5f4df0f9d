"""A server that reads each request to its end and answers so many bytes at once: the client's own ceiling.

Run by `ceiling` in a process of its own, as `python -m bench.load.trivial BYTES`; prints its port, and ends
when its stdin does, so that it never outlives who started it.
"""

from __future__ import annotations

import asyncio
import sys
from typing import cast

import uvloop

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
_END, _LENGTH = b"\r\n\r\n", b"\r\ncontent-length:"
_BUFFER = 1 << 18


class Trivial(asyncio.BufferedProtocol):
    """Counts a request's bytes, by its Content-Length, into one buffer that is never copied."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._buffer = memoryview(bytearray(_BUFFER))
        self._head = b""
        # Bytes of the body that are still to come; None while the head is read.
        self._rest: int | None = None
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        # uvloop's transports are not the standard library's classes.
        self._transport = cast(asyncio.WriteTransport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the next bytes go."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Count them, and answer at the end of each request."""
        assert self._transport is not None
        start = 0
        while start < nbytes:
            if self._rest is None:
                before = len(self._head)
                # A head is far shorter than this; only its bytes are copied.
                self._head += bytes(self._buffer[start : min(nbytes, start + 4096)])
                end = self._head.find(_END)
                if end < 0:
                    start += len(self._head) - before
                    continue
                start += end + len(_END) - before
                _, _, after = self._head[:end].lower().partition(_LENGTH)
                self._rest = int(after.partition(b"\r\n")[0] or 0)
                self._head = b""
            taken = min(self._rest, nbytes - start)
            start += taken
            self._rest -= taken
            if self._rest == 0:
                self._rest = None
                self._transport.write(self._answer)


async def serve(size: int) -> None:
    """Answer `size` bytes, head and body, to every request until stdin ends."""
    body = size - len(_HEAD % size)
    answer = _HEAD % max(0, body) + b"x" * max(0, body)
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), ended.set)
    server = await loop.create_server(lambda: Trivial(answer), "127.0.0.1", 0, backlog=1024)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await ended.wait()
    server.close()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
