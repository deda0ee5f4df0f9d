"""Where everything listens: what is asked for, what is free, and what nobody else may reach."""

from __future__ import annotations

from pathlib import Path

import pytest

from beeline.errors import ConfigError
from serve.addresses import Ports, resolve, settle
from serve.ports import Address
from serve.properties import Properties, load

FILE = Path("config.properties")


def properties(**addresses: str) -> Properties:
    return Properties(FILE, addresses={key: Address.parse(text) for key, text in addresses.items()})


def test_by_default_page_and_api_answer_on_two_ports() -> None:
    found = resolve(Properties(FILE), Ports(), "nginx")
    assert [str(address) for address in found.public] == ["http://127.0.0.1:8080", "http://127.0.0.1:8000"]
    assert (found.management.port, found.metrics and found.metrics.port, found.backend.port) == (8081, 8082, 0)


def test_without_a_gateway_the_server_itself_listens_there() -> None:
    found = resolve(Properties(FILE), Ports(), "none")
    assert found.backend == found.inference == Address("127.0.0.1", 8080)
    assert found.page is found.metrics is None


def test_another_port_takes_no_fixed_one_beside_it() -> None:
    found = resolve(Properties(FILE), Ports(9000), "nginx")
    assert (found.inference.port, found.page, found.management.port) == (9000, None, 8081)
    assert found.metrics is not None
    assert found.metrics.port == 0
    assert resolve(Properties(FILE), Ports(9000, page=9001), "nginx").page == Address("127.0.0.1", 9001)


@pytest.mark.parametrize(("gateway", "count"), [("nginx", 5), ("none", 2)])
def test_port_0_asks_for_free_ports_everywhere(gateway: str, count: int) -> None:
    """Behind a gateway, that and the server listen on ports of their own, for management too."""
    found = resolve(Properties(FILE), Ports(0), gateway)
    assert found.management.port == 0
    assert resolve(Properties(FILE), Ports(0, management=9), gateway).management.port == 9
    settled = settle(found, 32_767)
    taken = {address.port for address in vars(settled).values() if address is not None}
    assert 0 not in taken
    assert len(taken) == count


@pytest.mark.parametrize("key", ["management_address", "beeline_metrics_address"])
def test_management_and_metrics_are_loopbacks_alone(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is http://0.0.0.0:9, which other machines may reach"):
        resolve(properties(**{key: "http://0.0.0.0:9"}), Ports(), "nginx")


def test_only_nginx_may_face_a_network() -> None:
    open_to_all = properties(inference_address="http://0.0.0.0:8080")
    assert resolve(open_to_all, Ports(), "nginx").inference.host == "0.0.0.0"
    with pytest.raises(ConfigError, match="or leave --gateway none out: nginx may face"):
        resolve(open_to_all, Ports(), "none")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Ports(70_000), "--port is 70000; allowed: a whole number of a port"),
        (Ports(8081), "inference and management are both on http://127.0.0.1:8081; give --management-port another"),
        (Ports(page=8080), "inference and page are both on http://127.0.0.1:8080; give --page-port another one"),
    ],
)
def test_what_cannot_be_is_one_sentence(given: Ports, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(Properties(FILE), given, "nginx")
    assert said in str(caught.value)


def test_tls_has_an_address_with_its_certificate_only() -> None:
    assert resolve(Properties(FILE), Ports(), "nginx").tls is None
    with_certificate = Properties(FILE, texts={"beeline_tls_certificate": "/tls/chain.pem"})
    assert str(resolve(with_certificate, Ports(), "nginx").tls) == "https://127.0.0.1:8443"


KEYS = {"management_address": "BEELINE_MANAGEMENT_ADDRESS", "beeline_metrics_address": "BEELINE_METRICS_ADDRESS"}


@pytest.mark.parametrize("key", KEYS)
def test_beyond_loopback_through_the_variable_and_with_nginx_only(tmp_path: Path, key: str) -> None:
    """Who sets the variable knows what the network is; a file is copied from machine to machine."""
    file = tmp_path / "config.properties"
    file.write_text("")
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
    with pytest.raises(ConfigError, match=f"^config.properties: {key} is .* the environment variable {KEYS[key]}$"):
        resolve(load(file), Ports(), "nginx")
    # A variable of one key opens no other.
    other = next(each for each in KEYS if each != key)
    with pytest.raises(ConfigError, match=f"^config.properties: {key} is"):
        resolve(load(file, {KEYS[other]: "http://0.0.0.0:10"}), Ports(), "nginx")
    assert resolve(load(file, {KEYS[key]: "http://127.0.0.1:9"}), Ports(), "nginx")


def test_an_option_changes_the_port_of_a_variables_address(tmp_path: Path) -> None:
    file = tmp_path / "config.properties"
    file.write_text("")
    environ = {"BEELINE_INFERENCE_ADDRESS": "http://0.0.0.0:9000", "BEELINE_MANAGEMENT_ADDRESS": "http://0.0.0.0:9001"}
    found = resolve(load(file, environ), Ports(9100, management=9101), "nginx")
    assert (found.inference, found.management) == (Address("0.0.0.0", 9100), Address("0.0.0.0", 9101))
