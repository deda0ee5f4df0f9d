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

from beeline.answer import Answer
from host import processes
from serve.gateway.nginx import listening
from serve.gateway.prober import _STUCK
from tests.conftest import worker
from tests.serve.gateway.conftest import Gateway, Site, StandIn, both, certificate, wait_for

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


@both
def test_one_model_that_fails_closes_no_other(gateway: Gateway) -> None:
    site = gateway(models=("fake", "other"))
    server = site.backends[0]

    def asked() -> tuple[int, int, int]:
        other = requests.post(f"{site.url}/predictions/other", data="x", timeout=30).status_code
        version = requests.post(f"{site.url}/predictions/other/1.0", data="x", timeout=30).status_code
        return site.predict().status_code, other, version

    assert asked() == (200, 200, 200)
    server.away.add("other")
    assert site.wait_until(ready=False)["reason"] == "0 of 0 workers of other are ready"
    wait_for(asked, lambda seen: seen == (200, 503, 503))
    server.away.clear()
    site.wait_until(ready=True)
    assert asked() == (200, 200, 200)
    server.wrong.add("other")
    assert "expects 'red'" in site.wait_until_reason("expects")
    wait_for(asked, lambda seen: seen == (200, 503, 503))
    # What no archive has is the server's to refuse.
    assert requests.post(f"{site.url}/predictions/nobody", data="x", timeout=30).status_code == 200
    server.ready = False
    wait_for(asked, lambda seen: seen == (503, 503, 503))


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


@both
def test_a_reload_cuts_nothing_that_is_under_way(gateway: Gateway) -> None:
    site = gateway(backends=2, deadline=60)
    site.wait_until_members(2)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        url = f"{site.url}/predictions/long"
        long = [pool.submit(requests.post, url, data="hold", timeout=60) for _ in range(4)]
        wait_for(lambda: sum(each.seen.count("/predictions/long") for each in site.backends) == 4)
        assert all("/predictions/long" in each.seen for each in site.backends)
        site.backends[1].ready = False
        site.wait_until_members(1)
        site.release()
        assert [each.result().status_code for each in long] == [200] * 4


def test_a_busy_server_stays_ready(gateway: Gateway, tmp_path: Path) -> None:
    """Its golden picture waits like any request; it must not take the server out while clients get answers."""
    counts = worker(tmp_path, "fake")
    site = gateway(in_flight=2, deadline=90, counts=tmp_path)
    server = site.backends[0]
    # Held back for longer than somebody's answer may take, the golden picture that comes after ten seconds too.
    server.frozen = True
    asked = server.seen.count("/predictions/fake")
    wait_for(lambda: server.seen.count("/predictions/fake") > asked)
    end = time.monotonic() + _STUCK + 5
    while time.monotonic() < end:
        counts.count([Answer(200, "OK", "{}")], [1.0], {})
        ping = requests.get(f"{site.url}/ping", timeout=5)
        assert ping.status_code == 200, ping.text
        time.sleep(0.3)
    # From here on nobody gets one.
    assert f"nobody has got an answer for {_STUCK:g} s" in site.wait_until_reason("nobody")
    server.frozen = False
    site.release()
    site.wait_until(ready=True)


def test_a_gateway_ends_though_a_golden_picture_is_never_answered(gateway: Gateway) -> None:
    site = gateway(deadline=600)
    server = site.backends[0]
    server.frozen = True
    asked = server.seen.count("/predictions/fake")
    wait_for(lambda: server.seen.count("/predictions/fake") > asked)
    site.process.send_signal(signal.SIGINT)
    assert site.process.wait(timeout=40) == 0
    assert not server.released.is_set()


@both
def test_a_reload_that_nginx_refuses_is_said_and_tried_again(gateway: Gateway) -> None:
    site = gateway(backends=2)
    site.wait_until_members(2)
    spoilt = site.settings.folder / "settings" / "limits.conf"
    good = spoilt.read_text()
    spoilt.write_text("no such directive;\n")
    site.backends[1].ready = False
    log = site.settings.folder.parent / "process.log"
    wait_for(log.read_text, lambda text: "nginx has not taken its new configuration" in text)
    assert 'unknown directive "no"' in log.read_text().split("has not taken")[1]
    assert site.predict().status_code == 200
    spoilt.write_text(good)

    def left_out() -> bool:
        before = site.backends[1].seen.count("/predictions/fake")
        assert [site.predict().status_code for _ in range(4)] == [200] * 4
        return site.backends[1].seen.count("/predictions/fake") == before

    wait_for(left_out)


@both
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


@both
def test_what_is_on_its_way_is_answered_before_the_end(gateway: Gateway) -> None:
    site = gateway()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        last = pool.submit(requests.post, f"{site.url}/predictions/last", data="sleep 1.5", timeout=30)
        wait_for(lambda: "/predictions/last" in site.backends[0].seen)
        site.process.send_signal(signal.SIGTERM)
        assert last.result().status_code == 200
    assert site.process.wait(timeout=30) == 0
    with pytest.raises(requests.ConnectionError):
        site.predict()


@both
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nginx_ends_with_its_parent_however_that_ends(gateway: Gateway, number: signal.Signals) -> None:
    site = gateway()
    assert len(running_nginx(site)) >= 2
    site.process.send_signal(number)
    site.process.wait(timeout=30)
    deadline = time.monotonic() + 10
    while running_nginx(site):
        assert time.monotonic() < deadline, "nginx outlived its parent"
        time.sleep(0.05)


@both
def test_a_killed_nginx_ends_the_process_and_leaves_nothing(gateway: Gateway) -> None:
    """The supervisor above starts it anew."""
    site = gateway()
    master = int((site.settings.folder / "nginx.pid").read_text())
    os.kill(master, signal.SIGKILL)
    assert site.process.wait(timeout=30) == 1
    assert running_nginx(site) == []


@both
def test_a_killed_worker_of_nginx_comes_back(gateway: Gateway) -> None:
    site = gateway()
    master = psutil.Process(int((site.settings.folder / "nginx.pid").read_text()))
    (worker,) = master.children()
    worker.kill()
    wait_for(lambda: [each for each in master.children() if each != worker and listening(each)], seconds=10)
    assert site.predict().status_code == 200
    assert site.process.poll() is None


@both
def test_tls_with_a_mounted_certificate(gateway: Gateway, tmp_path: Path) -> None:
    chain, key = certificate(tmp_path)
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


def running_nginx(site: Site) -> list[psutil.Process]:
    found = processes.marked("no such variable", "-", site.settings.folder)
    return [each for each in found if each.name() == "nginx"]
