"""Addresses: how they are written and reached, free ports, and who holds a taken one."""

from __future__ import annotations

import os
import socket

import pytest

from beeline.errors import BeelineError, Undetermined
from serve.ports import Address, settle

LOCAL = Address("127.0.0.1", 0)


@pytest.mark.parametrize(
    "text", ["127.0.0.1:80", "ftp://a:1", "http://a", "http://:80", "http://a:1/path", "http://[::1", "8080"]
)
def test_a_wrong_address_is_refused_with_the_form_of_a_right_one(text: str) -> None:
    with pytest.raises(ValueError, match="http://HOST:PORT"):
        Address.parse(text)


def test_an_address_is_written_as_it_was_read_and_reached_from_this_machine() -> None:
    assert str(Address.parse("https://[::]:8443/")) == "https://[::]:8443"
    assert str(Address.parse("http://0.0.0.0:80").local) == "http://127.0.0.1:80"
    hosts = ("127.0.0.1", "127.1.2.3", "localhost", "0.0.0.0", "127.evil.example")
    assert [Address(host, 8080).loopback for host in hosts] == [True, True, True, False, False]


def test_free_ports_differ_and_suit_both_servers() -> None:
    settled = settle([(LOCAL, "--port"), (LOCAL, "--management-port")])
    assert len({address.port for address in settled}) == 2
    for address in settled:
        assert 1024 < address.port <= 32_767
        # A server can really listen on it.
        socket.create_server((address.host, address.port)).close()


def test_a_taken_port_names_itself_its_holder_and_the_fix() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(BeelineError) as caught:
            settle([(Address("127.0.0.1", port), "--port")])
    assert f"port {port} is taken by" in str(caught.value)
    assert f"(pid {os.getpid()})" in str(caught.value)
    assert "choose another port with --port (0 for a free one)" in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_port_that_the_server_or_this_machine_cannot_use_is_refused() -> None:
    with pytest.raises(BeelineError, match="port 40000 is over 32767, this server's last"):
        settle([(Address("127.0.0.1", 40_000), "--port")], highest=32_767)
    with pytest.raises(Undetermined, match=r"cannot listen on http://192\.0\.2\.1:8080"):
        settle([(Address("192.0.2.1", 8080), "--port")])
