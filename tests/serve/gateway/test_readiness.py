"""Readiness that is true, reloads that cut nothing, TLS, and how a gateway ends."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import socket
import ssl
import subprocess
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import requests

from archive.store import find_archives
from beeline.answer import Answer
from host import processes
from serve.gateway import prober
from serve.gateway.nginx import listening
from serve.gateway.prober import Probe, Seen
from serve.gateway.settings import Backend
from tests.conftest import worker
from tests.serve.conftest import MakeArchive
from tests.serve.gateway.conftest import Gateway, Site, StandIn, both, certificate, settings_of, wait_for


@pytest.mark.server
def test_ready_is_workers_and_a_golden_picture(gateway: Gateway) -> None:
    site = gateway()
    assert site.wait_until(ready=True) == {"status": "Healthy", "models": {"fake": {"1.0": {"workers": 1, "ready": 1}}}}
    server = site.backends[0]

    server.ready = False
    assert site.wait_until(ready=False)["reason"] == "0 of 1 workers of fake are ready"
    refused = site.predict()
    assert (refused.status_code, refused.json()["type"]) == (503, "NotReady")
    assert int(refused.headers["Retry-After"]) >= 1

    server.label = "blue"
    server.ready = True
    site.wait_until_reason("expects 'red'")
    assert site.predict().status_code == 503

    server.label = "red"
    site.wait_until(ready=True)
    assert site.predict().status_code == 200


@pytest.mark.server
def test_one_model_that_fails_closes_no_other(gateway: Gateway) -> None:
    site = gateway(models=("fake", "other"))
    server = site.backends[0]

    def statuses() -> list[int]:
        return [site.predict(model=model).status_code for model in ("fake", "other", "other/1.0")]

    assert statuses() == [200, 200, 200]
    server.away.add("other")
    assert site.wait_until(ready=False)["reason"] == "0 of 0 workers of other are ready"
    wait_for(statuses, lambda seen: seen == [200, 503, 503])
    server.away.clear()
    site.wait_until(ready=True)
    assert statuses() == [200, 200, 200]
    server.wrong.add("other")
    site.wait_until_reason("expects 'red'")
    wait_for(statuses, lambda seen: seen == [200, 503, 503])
    # For a model without an archive the server itself answers.
    assert site.predict(model="nobody").status_code == 200
    server.ready = False
    wait_for(statuses, lambda seen: seen == [503, 503, 503])


@pytest.mark.server
def test_a_server_that_answers_nonsense_or_is_gone_is_not_ready_and_comes_back(gateway: Gateway) -> None:
    site = gateway(wait=False)
    server = site.backends[0]
    server.form = [5]
    site.wait_until_reason("names no label")
    server.form = None
    site.wait_until(ready=True)
    server.stop()
    assert "does not answer" in site.wait_until(ready=False)["reason"]
    site.backends[0] = StandIn(server.inference.server_port, server.management.server_port)
    site.wait_until(ready=True)
    assert site.predict().status_code == 200


def test_a_busy_server_is_ready_until_nobody_gets_an_answer(
    make_fake: MakeArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its golden picture waits like any request; it must not take the server out while clients get answers."""
    monkeypatch.setattr(prober, "_GOLDEN", 0.1)
    monkeypatch.setattr(prober, "_STUCK", 0.5)
    make_fake(tmp_path / "store", expected="red")
    (tmp_path / "counts").mkdir()
    counts = worker(tmp_path / "counts", "fake")
    server = StandIn()
    backend = Backend(server.backend.inference, server.backend.management, str(tmp_path / "counts"))
    with closing(Probe(backend, find_archives(tmp_path / "store"), settings_of(tmp_path, deadline=3))) as probe:
        wait_for(probe.look, lambda seen: seen.ready)
        server.frozen = True
        wait_for(lambda: probe.look() and server.busy, bool)

        def look(answers: int) -> Seen:
            counts.count([Answer(200, "OK", "{}")] * answers, [1.0] * answers, {})
            return probe.look()

        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            assert look(answers=1).ready
        # Its golden picture is given up after the deadline, and nobody gets an answer while the next one waits.
        wait_for(probe.look, lambda seen: "nobody has got an answer for 0.5 s" in seen.reason)
        server.frozen = False
        server.released.set()
        wait_for(probe.look, lambda seen: seen.ready)
    server.stop()


@pytest.mark.parametrize(("models", "seconds"), [(1, 1.0), (10, 1.0), (30, 3.0)])
def test_many_models_are_looked_at_less_often(
    make_fake: MakeArchive, tmp_path: Path, models: int, seconds: float
) -> None:
    make_fake(tmp_path / "store", expected="red")
    archives = find_archives(tmp_path / "store") * models
    with closing(Probe(Backend("http://nowhere", "http://nowhere"), archives, settings_of(tmp_path))) as probe:
        assert probe.calm == seconds


@pytest.mark.server
def test_a_gateway_ends_though_a_golden_picture_is_never_answered(gateway: Gateway) -> None:
    site = gateway(deadline=600)
    server = site.backends[0]
    server.frozen = True
    server.ready = False
    site.wait_until(ready=False)
    server.ready = True
    wait_for(lambda: server.busy)
    site.process.send_signal(signal.SIGINT)
    assert site.process.wait(timeout=40) == 0
    assert not server.released.is_set()


@pytest.mark.server
@both
def test_a_reload_cuts_no_request_under_way(gateway: Gateway) -> None:
    site = gateway(backends=2, deadline=60)
    site.wait_until_members(2)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        long = [pool.submit(site.predict, "hold", "long") for _ in range(4)]
        wait_for(lambda: site.count("/predictions/long") == 4)
        assert all("/predictions/long" in each.seen for each in site.backends)
        site.backends[1].ready = False
        site.wait_until_members(1)
        site.release()
        assert [each.result().status_code for each in long] == [200] * 4


@pytest.mark.server
def test_a_reload_that_nginx_refuses_is_logged_and_tried_again(gateway: Gateway) -> None:
    site = gateway(backends=2)
    site.wait_until_members(2)
    spoilt = site.settings.folder / "settings" / "limits.conf"
    good = spoilt.read_text()
    spoilt.write_text("no such directive;\n")
    site.backends[1].ready = False
    log = site.settings.folder.parent / "process.log"
    text = wait_for(log.read_text, lambda text: "nginx has not taken its new configuration" in text)
    assert 'unknown directive "no"' in text.split("has not taken")[1]
    assert site.predict().status_code == 200
    spoilt.write_text(good)

    def is_left_out() -> bool:
        before = site.backends[1].seen.count("/predictions/fake")
        assert [site.predict().status_code for _ in range(4)] == [200] * 4
        return site.backends[1].seen.count("/predictions/fake") == before

    wait_for(is_left_out)


@pytest.mark.server
def test_nginx_ends_with_a_gateway_that_is_killed(gateway: Gateway) -> None:
    site = gateway()
    assert len(nginx_of(site)) >= 2
    site.process.kill()
    wait_for(lambda: not nginx_of(site), seconds=10)


@pytest.mark.server
@both
def test_a_killed_worker_of_nginx_comes_back_and_a_killed_nginx_ends_the_gateway(gateway: Gateway) -> None:
    """The supervisor then starts the gateway again."""
    site = gateway()
    master = psutil.Process(int((site.settings.folder / "nginx.pid").read_text()))
    (old,) = master.children()
    old.kill()
    wait_for(lambda: [each for each in master.children() if each != old and listening(each)], seconds=10)
    assert site.predict().status_code == 200
    assert site.process.poll() is None
    os.kill(master.pid, signal.SIGKILL)
    assert site.process.wait(timeout=30) == 1
    assert nginx_of(site) == []


def nginx_of(site: Site) -> list[psutil.Process]:
    found = processes.marked(folder=site.settings.folder)
    return [each for each in found if each.name() == "nginx"]


@pytest.mark.server
@both
def test_tls_with_a_certificate_and_http2(gateway: Gateway, tmp_path: Path) -> None:
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
    without_tls = requests.get(url.replace("https", "http"), timeout=30)
    assert (without_tls.status_code, without_tls.json()["type"]) == (400, "BadRequest")
