"""Readiness that is true, several servers behind one gateway, and how a gateway ends."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import socket
import ssl
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import requests

from serve import processes
from tests.serve.gateway.conftest import Gateway, Site, StandIn

pytestmark = pytest.mark.server


def test_ready_is_workers_and_a_golden_picture(gateway: Gateway) -> None:
    site = gateway()
    said = site.wait_until(ready=True)
    assert said == {"status": "Healthy", "models": {"fake": {"1.0": {"workers": 1, "ready": 1}}}}
    server = site.backends[0]

    server.ready = False
    said = site.wait_until(ready=False)
    assert said["reason"] == "0 of 1 workers of fake are ready"
    refused = site.predict()
    assert (refused.status_code, refused.json()["type"]) == (503, "NotReady")
    assert int(refused.headers["Retry-After"]) >= 1

    server.label = "blue"
    server.ready = True
    assert "expects 'red'" in site.wait_until_reason("expects")
    assert site.predict().status_code == 503

    server.label = "red"
    site.wait_until(ready=True)
    assert site.predict().status_code == 200


def test_a_server_that_is_gone_is_not_ready_and_comes_back(gateway: Gateway) -> None:
    site = gateway()
    server = site.backends[0]
    ports = server.inference.server_port, server.management.server_port
    server.stop()
    assert "does not answer" in site.wait_until(ready=False)["reason"]
    site.backends[0] = StandIn(*ports)
    site.wait_until(ready=True)
    assert site.predict().status_code == 200


def test_an_answer_of_another_form_is_no_readiness_and_stops_no_watch(gateway: Gateway) -> None:
    site = gateway(wait=False)
    site.backends[0].form = [5]
    assert "names no label" in site.wait_until_reason("names no label")
    site.backends[0].form = None
    site.wait_until(ready=True)
    site.backends[0].stop()
    assert "does not answer" in site.wait_until(ready=False)["reason"]


def test_a_reload_cuts_nothing_that_is_under_way(gateway: Gateway) -> None:
    site = gateway(backends=2, deadline=30)
    site.wait_until_members(2)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        long = [pool.submit(site.predict, "sleep 11") for _ in range(4)]
        while sum(each.busy for each in site.backends) < 4:
            time.sleep(0.05)
        site.backends[1].ready = False
        site.wait_until_members(1)
        assert [each.result().status_code for each in long] == [200] * 4


def test_a_busy_server_stays_ready(gateway: Gateway) -> None:
    """Its golden picture waits like any request; it must not take the server out while clients get answers."""
    site = gateway(in_flight=2, deadline=20)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        busy = [pool.submit(site.predict, "sleep 6") for _ in range(2)]
        while not all(each.done() for each in busy):
            assert requests.get(f"{site.url}/ping", timeout=5).status_code == 200
            time.sleep(0.3)
    assert [each.result().status_code for each in busy] == [200, 200]


def test_the_load_is_shared_and_a_dead_server_is_taken_out(gateway: Gateway) -> None:
    site = gateway(backends=3, in_flight=20)
    site.wait_until_members(3)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(answer.ok for answer in pool.map(site.predict, ["sleep 0.05"] * 60))
        assert all(each.seen.count("/predictions/fake") >= 10 for each in site.backends)
        # Under load one of them goes: whoever was on it is answered by another.
        under_way = [pool.submit(site.predict, "sleep 0.05") for _ in range(200)]
        site.backends[1].stop()
        assert {each.result().status_code for each in under_way} == {200}
    members = site.wait_until_members(2)
    assert site.backends[1].backend.inference.removeprefix("http://") not in members


def test_what_is_on_its_way_is_answered_before_the_end(gateway: Gateway) -> None:
    site = gateway()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        last = pool.submit(site.predict, "sleep 1.5")
        while not site.backends[0].busy:
            time.sleep(0.02)
        site.process.send_signal(signal.SIGTERM)
        assert last.result().status_code == 200
    assert site.process.wait(timeout=30) == 0
    with pytest.raises(requests.ConnectionError):
        site.predict()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nginx_ends_with_its_parent_however_that_ends(gateway: Gateway, number: signal.Signals) -> None:
    site = gateway()
    assert len(nginx_of(site)) >= 2
    site.process.send_signal(number)
    site.process.wait(timeout=30)
    deadline = time.monotonic() + 10
    while nginx_of(site):
        assert time.monotonic() < deadline, "nginx outlived its parent"
        time.sleep(0.05)


def test_a_killed_nginx_ends_the_process_and_leaves_nothing(gateway: Gateway) -> None:
    """The supervisor above starts it anew."""
    site = gateway()
    time.sleep(1.5)
    master = int((site.settings.folder / "nginx.pid").read_text())
    os.kill(master, signal.SIGKILL)
    assert site.process.wait(timeout=30) == 1
    assert nginx_of(site) == []


def test_tls_with_a_mounted_certificate(gateway: Gateway, tmp_path: Path) -> None:
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    make += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*make, "-keyout", str(key), "-out", str(chain)], check=True, capture_output=True)
    site = gateway(tls=(chain, key))
    assert site.settings.tls is not None
    url = str(site.settings.tls.address)
    assert requests.post(f"{url}/predictions/fake", data="x", verify=str(chain), timeout=30).status_code == 200
    context = ssl.create_default_context(cafile=chain)
    context.set_alpn_protocols(["h2", "http/1.1"])
    plain = socket.create_connection(("127.0.0.1", site.settings.tls.address.port), timeout=10)
    with plain, context.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
        assert (connection.version(), connection.selected_alpn_protocol()) == ("TLSv1.3", "h2")
    big = tmp_path / "big"
    big.write_bytes(bytes(200_000))
    command = ["curl", "-s", "--http2", "--cacert", str(chain), "-T", str(big), f"{url}/predictions/fake"]
    assert json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["type"] == "TooManyBytes"
    plain_http = requests.get(url.replace("https", "http"), timeout=30)
    assert (plain_http.status_code, plain_http.json()["type"]) == (400, "BadRequest")


def nginx_of(site: Site) -> list[psutil.Process]:
    found = processes.marked("no such variable", "-", site.settings.folder)
    return [each for each in found if each.name() == "nginx"]
