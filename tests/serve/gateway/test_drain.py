"""A gateway that is told to stop: /ping says no first, requests are let through a while, then the last are answered."""

from __future__ import annotations

import concurrent.futures
import json
import signal
import time

import pytest
import requests

from serve.gateway import runtime
from tests.serve.gateway.conftest import Cluster, Gateway, Site, both
from tests.serve.gateway.test_discovery import wait_for
from tests.serve.gateway.test_remote_backends import members

pytestmark = pytest.mark.server


@both
def test_predictions_are_let_through_after_ping_says_no(gateway: Gateway) -> None:
    # Long enough that a slow machine's next requests come before its end.
    site = gateway(drain=20, stop=30, deadline=60)
    began = time.monotonic()
    site.process.send_signal(signal.SIGTERM)
    assert site.wait_until(ready=False) == {"status": "Unhealthy", "reason": "the gateway is stopping", "models": {}}
    assert site.predict().status_code == 200
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        # It begins before the door is closed and ends after that.
        last = pool.submit(site.predict, "sleep 21")
        assert last.result().status_code == 200
    assert site.process.wait(timeout=30) == 0
    assert time.monotonic() - began >= 20
    with pytest.raises(requests.ConnectionError):
        site.predict()


@both
def test_what_is_under_way_too_long_is_cut(gateway: Gateway) -> None:
    site = gateway(stop=1, deadline=30)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        last = pool.submit(site.predict, "sleep 20")
        wait_for(lambda: site.backends[0].busy > 0)
        site.process.send_signal(signal.SIGTERM)
        site.process.wait(timeout=15)
        assert not last.done() or last.exception() is not None


def test_one_that_was_not_ready_lets_nothing_through(gateway: Gateway) -> None:
    site = gateway(wait=False, drain=20)
    site.backends[0].label = "blue"
    site.wait_until_reason("expects")
    site.process.send_signal(signal.SIGTERM)
    site.wait_until_reason("stopping")
    assert site.predict().status_code == 503


def test_a_second_signal_shortens_nothing(gateway: Gateway) -> None:
    """An engine that stops a container may send it to every process of it."""
    site = gateway(drain=20)
    began = time.monotonic()
    for _ in range(3):
        site.process.send_signal(signal.SIGTERM)
        site.wait_until(ready=False)
    assert site.predict().status_code == 200
    assert site.process.wait(timeout=60) == 0
    assert time.monotonic() - began >= 20


def test_a_backend_that_drains_under_load_costs_nobody_an_answer(cluster: Cluster) -> None:
    sites = [cluster.backend(host, drain=20) for host in cluster.HOSTS[:2]]
    cluster.resolve_to(*cluster.HOSTS[:2])
    site = cluster.gateway(in_flight=50)
    wait_for(lambda: len(members(site)) == 2)
    statuses: list[int] = []
    over: list[bool] = []

    def load() -> None:
        while not over:
            statuses.append(site.predict("sleep 0.02").status_code)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(load) for _ in range(4)]
        try:
            wait_for(lambda: all(each.backends[0].seen.count("/predictions/fake") >= 10 for each in sites))
            sites[0].process.send_signal(signal.SIGTERM)
            wait_for(lambda: members(site) == ["127.0.0.3"])
            # It left the group while its door was open still, so nobody had to be sent on.
            assert sites[0].process.poll() is None
            assert sites[0].process.wait(timeout=60) == 0
        finally:
            over.append(True)
    assert all(each.exception() is None for each in running)
    assert set(statuses) == {200}
    assert not sent_on(site, len(statuses))


def sent_on(site: Site, count: int) -> list[str]:
    """Return the backends of every one of so many requests that was tried more than once."""
    return [str(line["backend"]) for line in site.log(count) if "," in str(line["backend"])]


def test_the_state_is_told_by_files(gateway: Gateway) -> None:
    site = gateway()
    settings = site.settings
    assert [(settings.state / name).exists() for name in ("ready", "open")] == [True, True]
    text = json.dumps({"status": "Unhealthy", "reason": "x", "models": {}})
    runtime.write_state(settings, ready=False, text=text, draining=True)
    assert [(settings.state / name).exists() for name in ("ready", "open")] == [False, True]
    assert (requests.get(f"{site.url}/ping", timeout=5).status_code, site.predict().status_code) == (503, 200)
    runtime.write_state(settings, ready=False, text=text)
    assert site.predict().status_code == 503
