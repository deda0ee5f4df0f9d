"""Ports: free ones on request, and who holds a taken one."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from beeline.errors import BeelineError, Undetermined
from serve.ports import Address, settle


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_free_ports_differ_and_suit_both_servers() -> None:
    wanted = [(Address("127.0.0.1", 0), "--port"), (Address("127.0.0.1", 0), "--management-port")]
    settled = settle(wanted)
    assert len({address.port for address in settled}) == 2
    assert all(1024 < address.port <= 32_767 for address in settled)
    # They are really free: a server can listen on them.
    for address in settled:
        socket.create_server((address.host, address.port)).close()


def test_a_taken_port_names_itself_its_holder_and_the_fix(taken: int) -> None:
    with pytest.raises(BeelineError) as caught:
        settle([(Address("127.0.0.1", taken), "--port")])
    assert f"port {taken} is taken by" in str(caught.value)
    assert f"(pid {os.getpid()})" in str(caught.value)
    assert "choose another port with --port (0 for a free one)" in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_port_over_the_servers_last_is_refused() -> None:
    with pytest.raises(BeelineError, match="port 40000 is over 32767, this server's last"):
        settle([(Address("127.0.0.1", 40_000), "--port")], highest=32_767)


def test_an_address_that_is_not_this_machines_is_undetermined() -> None:
    with pytest.raises(Undetermined, match=r"cannot listen on http://192\.0\.2\.1:8080"):
        settle([(Address("192.0.2.1", 8080), "--port")])
