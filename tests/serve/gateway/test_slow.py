"""Slow clients use only their own share of connections, places and disk."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import socket
import threading
import time
import types
from collections.abc import Iterator

import pytest

from tests.serve.gateway.conftest import Gateway, Site, wait_for

pytestmark = pytest.mark.server
# Every address of 127/8 is this machine; each stands for another client.
SLOW, OTHER = "127.0.0.2", "127.0.0.3"


@contextlib.contextmanager
def begun(site: Site, address: str, count: int, length: int) -> Iterator[list[socket.socket]]:
    """Begin so many requests with bodies of that length, and send a byte of each every second."""
    found: list[socket.socket] = []
    over = threading.Event()

    def trickle() -> None:
        while not over.wait(1):
            for connection in list(found):
                with contextlib.suppress(OSError):
                    connection.send(b"x")

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        for _ in range(count):
            found.append(socket.create_connection(("127.0.0.1", site.port), 30, (address, 0)))
            head = f"POST /predictions/slow HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\nx"
            found[-1].sendall(head.encode())
            found[-1].setblocking(False)
        yield found
    finally:
        over.set()
        thread.join()
        for connection in found:
            connection.close()


def status(site: Site, address: str, length: int) -> int:
    """Send a whole body of that length from an address, and return the answer's status."""
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=30, source_address=(address, 0))
    with contextlib.closing(connection):
        connection.request("POST", "/predictions/fake", bytes(length))
        return connection.getresponse().status


def refused(connections: list[socket.socket]) -> int:
    """Return how many of them were answered 429 already."""
    count = 0
    for connection in connections:
        with contextlib.suppress(BlockingIOError):
            count += connection.recv(12, socket.MSG_PEEK).endswith(b"429")
    return count


@pytest.mark.parametrize(("length", "free"), [(1_000_000, 2 * 8 * 2_000_000), (300_000, 4 * 8 * 1_000_000)])
def test_bodies_in_files_fill_no_disk_and_leave_room_for_another_address(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, length: int, free: int
) -> None:
    """The temporary folder has room for 8 of these; one address gets half of that."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free))
    site = gateway(in_flight=50, max_body=2_000_000)
    with begun(site, SLOW, 20, length) as slow:
        wait_for(lambda: refused(slow), lambda count: count == 16)
        assert status(site, OTHER, length) == 200
        assert status(site, SLOW, length) == 429
        # Bodies in memory do not count.
        assert status(site, SLOW, 200_000) == 200
        with begun(site, OTHER, 4, length) as more:
            wait_for(lambda: status(site, "127.0.0.4", length), lambda code: code == 429)
            assert refused(more) == 0


def test_half_a_header_and_a_body_that_stops_are_given_up_and_keep_nobody_out(gateway: Gateway) -> None:
    """A connection counts for its address once its header is complete; until then a short time bounds it."""
    site = gateway()
    with contextlib.ExitStack() as stack:
        stopped, *slow = (
            stack.enter_context(socket.create_connection(("127.0.0.1", site.port), 30)) for _ in range(501)
        )
        stopped.sendall(b"POST /predictions/slow HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf")
        for connection in slow:
            connection.sendall(b"POST /predictions/fake HTTP/1.1\r\nHost: x\r\nX-Half: of")
        assert site.predict().status_code == 200
        assert site.ping()[0] == 200
        assert {connection.recv(99)[9:12] for connection in slow} <= {b"408", b""}
        # nginx answers nothing to a body that stops; the log has 408.
        assert stopped.recv(99) == b""
    assert wait_for(lambda: [line["status"] for line in site.log() if "slow" in line["request"]]) == [408]
    assert "/predictions/slow" not in site.backends[0].seen


def test_slow_clients_hold_no_place_of_the_server(gateway: Gateway) -> None:
    """There are more of them than places; their bodies come a byte at a time."""
    site = gateway(in_flight=4)
    slow = [socket.create_connection(("127.0.0.1", site.port), timeout=30) for _ in range(6)]
    for connection in slow:
        connection.sendall(b"POST /predictions/slow HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n")
    for _ in range(4):
        for connection in slow:
            connection.sendall(b"x")
        assert site.predict().status_code == 200
        time.sleep(0.3)
    assert "/predictions/slow" not in site.backends[0].seen
    for connection in slow[:4]:
        connection.sendall(b"x")
    assert {connection.recv(999).split()[1] for connection in slow[:4]} == {b"200"}
    for connection in slow:
        connection.close()
