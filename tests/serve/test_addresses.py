"""Where everything listens: addresses, free and taken ports, and what only this machine may reach."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from beeline.errors import BeelineError, ConfigError, Undetermined
from serve import ports
from serve.addresses import Ports, resolve, settle
from serve.ports import Address
from serve.properties import Properties, load

FILE = Properties(Path("config.properties"))
KEYS = {"management_address": "BEELINE_MANAGEMENT_ADDRESS", "beeline_metrics_address": "BEELINE_METRICS_ADDRESS"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.properties"
    path.touch()
    return path


def test_page_and_api_answer_on_two_ports_unless_another_one_is_given() -> None:
    found = resolve(FILE, Ports(), "nginx")
    assert [str(address) for address in found.public] == ["http://127.0.0.1:8080", "http://127.0.0.1:8000"]
    assert (found.management.port, found.metrics and found.metrics.port, found.backend.port) == (8081, 8082, 0)
    other = resolve(FILE, Ports(9000), "nginx")
    assert (other.inference.port, other.page, other.management.port) == (9000, None, 8081)
    assert other.metrics == Address("127.0.0.1", 0)
    assert resolve(FILE, Ports(9000, page=9001), "nginx").page == Address("127.0.0.1", 9001)


def test_without_a_gateway_the_server_itself_listens_there() -> None:
    found = resolve(FILE, Ports(), "none")
    assert found.backend == found.inference == Address("127.0.0.1", 8080)
    assert found.page is found.metrics is None


@pytest.mark.parametrize(("gateway", "count"), [("nginx", 5), ("none", 2)])
def test_port_0_asks_for_free_ports_everywhere(gateway: str, count: int) -> None:
    """With a gateway, the server has two more ports of its own."""
    found = resolve(FILE, Ports(0), gateway)
    assert found.management.port == 0
    assert resolve(FILE, Ports(0, management=9), gateway).management.port == 9
    used = {address.port for address in vars(settle(found, 32_767)).values() if address is not None}
    assert 0 not in used
    assert len(used) == count


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Ports(70_000), "--port is 70000; allowed: a whole number of a port"),
        (Ports(8081), "inference and management are both on http://127.0.0.1:8081; give --management-port another"),
        (Ports(page=8080), "inference and page are both on http://127.0.0.1:8080; give --page-port another one"),
    ],
)
def test_impossible_ports_are_one_sentence(given: Ports, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(FILE, given, "nginx")
    assert said in str(caught.value)


def test_tls_has_an_address_only_with_its_certificate() -> None:
    assert resolve(FILE, Ports(), "nginx").tls is None
    with_certificate = Properties(FILE.path, texts={"beeline_tls_certificate": "/tls/chain.pem"})
    assert str(resolve(with_certificate, Ports(), "nginx").tls) == "https://127.0.0.1:8443"


def test_only_nginx_may_face_a_network() -> None:
    open_to_all = Properties(FILE.path, addresses={"inference_address": Address("0.0.0.0", 8080)})
    assert resolve(open_to_all, Ports(), "nginx").inference.host == "0.0.0.0"
    with pytest.raises(ConfigError, match="or leave --gateway none out: nginx may face"):
        resolve(open_to_all, Ports(), "none")


@pytest.mark.parametrize("key", KEYS)
def test_management_and_metrics_leave_loopback_only_through_their_variable_and_with_nginx(file: Path, key: str) -> None:
    """A variable is set for one network; a file is copied from machine to machine."""
    environ = {KEYS[key]: "http://0.0.0.0:9"}
    found = resolve(load(file, environ), Ports(), "nginx")
    assert Address("0.0.0.0", 9) in (found.management, found.metrics)
    if key == "beeline_metrics_address":
        # There is no exporter without a gateway.
        assert resolve(load(file, environ), Ports(), "none").metrics is None
    else:
        with pytest.raises(ConfigError, match=f"^environment {KEYS[key]}: {key} is http://0.0.0.0:9, which other"):
            resolve(load(file, environ), Ports(), "none")
    file.write_text(f"{key}=http://0.0.0.0:9\n")
    said = f"^config.properties: {key} is http://0.0.0.0:9, which .* the environment variable {KEYS[key]}$"
    # The variable of one key opens no other.
    (other,) = set(KEYS) - {key}
    for variables in ({}, {KEYS[other]: "http://0.0.0.0:10"}):
        with pytest.raises(ConfigError, match=said):
            resolve(load(file, variables), Ports(), "nginx")
    assert resolve(load(file, {KEYS[key]: "http://127.0.0.1:9"}), Ports(), "nginx")


def test_an_option_changes_the_port_of_a_variables_address(file: Path) -> None:
    environ = {"BEELINE_INFERENCE_ADDRESS": "http://0.0.0.0:9000", "BEELINE_MANAGEMENT_ADDRESS": "http://0.0.0.0:9001"}
    found = resolve(load(file, environ), Ports(9100, management=9101), "nginx")
    assert (found.inference, found.management) == (Address("0.0.0.0", 9100), Address("0.0.0.0", 9101))


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
    settled = ports.settle([(Address("127.0.0.1", 0), "--port")] * 2)
    assert len({address.port for address in settled}) == 2
    for address in settled:
        assert 1024 < address.port <= 32_767
        # A server can really listen on it.
        socket.create_server((address.host, address.port)).close()


def test_a_taken_port_names_itself_its_holder_and_the_fix() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(BeelineError) as caught:
            ports.settle([(Address("127.0.0.1", port), "--port")])
    assert f"port {port} is taken by" in str(caught.value)
    assert f"(pid {os.getpid()})" in str(caught.value)
    assert "choose another port with --port (0 for a free one)" in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_port_that_the_server_or_this_machine_cannot_use_is_refused() -> None:
    with pytest.raises(BeelineError, match="port 40000 is over 32767, this server's last"):
        ports.settle([(Address("127.0.0.1", 40_000), "--port")], highest=32_767)
    with pytest.raises(Undetermined, match=r"cannot listen on http://192\.0\.2\.1:8080"):
        ports.settle([(Address("192.0.2.1", 8080), "--port")])


def test_an_address_of_ipv6_is_taken() -> None:
    (settled,) = ports.settle([(Address("::1", 0), "--port")])
    socket.create_server((settled.host, settled.port), family=socket.AF_INET6).close()
