"""A gateway that stops: `/ping` says no first, requests pass for a while, then the last requests are answered."""

from __future__ import annotations

import concurrent.futures
import signal
import time

import pytest
import requests

from tests.serve.gateway.conftest import Cluster, Gateway, hosts, wait_for

pytestmark = pytest.mark.server


def test_predictions_pass_after_ping_says_no_and_a_second_signal_shortens_nothing(gateway: Gateway) -> None:
    """An engine that stops a container may send the signal to every process of it."""
    # Long enough that a slow machine's next requests come before its end.
    site = gateway(drain=8, stop=20, deadline=60)
    began = time.monotonic()
    for _ in range(3):
        site.process.send_signal(signal.SIGTERM)
        gone = {"status": "Unhealthy", "reason": "the gateway is stopping", "models": {}}
        assert site.wait_until(ready=False) == gone
    assert site.predict().status_code == 200
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        # Sent before the gateway closes, and answered afterwards.
        last = pool.submit(site.predict, "sleep 9")
        assert last.result().status_code == 200
    assert site.process.wait(timeout=30) == 0
    assert time.monotonic() - began >= 8
    with pytest.raises(requests.ConnectionError):
        site.predict()


def test_a_request_that_takes_too_long_is_cut_at_the_end(gateway: Gateway) -> None:
    site = gateway(stop=1, deadline=30)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        last = pool.submit(site.predict, "hold")
        wait_for(lambda: site.backends[0].busy > 0)
        site.process.send_signal(signal.SIGTERM)
        site.process.wait(timeout=15)
        assert isinstance(last.exception(timeout=30), requests.ConnectionError)
        site.release()


def test_a_gateway_that_was_not_ready_lets_nothing_pass(gateway: Gateway) -> None:
    site = gateway(wait=False, drain=5)
    site.backends[0].label = "blue"
    site.wait_until_reason("expects")
    site.process.send_signal(signal.SIGTERM)
    site.wait_until_reason("stopping")
    assert site.predict().status_code == 503


def test_backends_that_drain_or_are_killed_under_load_cost_no_answer(cluster: Cluster) -> None:
    sites = [cluster.backend(host, drain=5) for host in cluster.HOSTS]
    cluster.resolve_to(*cluster.HOSTS)
    site = cluster.gateway(in_flight=50)
    wait_for(lambda: len(hosts(site)) == 3)
    statuses: list[int] = []
    over: list[bool] = []

    def load() -> None:
        while not over:
            statuses.append(site.predict("sleep 0.02").status_code)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(load) for _ in range(4)]
        try:
            wait_for(lambda: all(each.count("/predictions/fake") >= 10 for each in sites))
            sites[0].process.send_signal(signal.SIGTERM)
            wait_for(lambda: hosts(site) == ["127.0.0.3", "127.0.0.4"])
            # It left the group while it still took requests, so no request was tried again.
            assert sites[0].process.poll() is None
            assert sites[0].process.wait(timeout=60) == 0
            assert not [line for line in site.log(len(statuses) // 2) if "," in str(line["backend"])]
            # Its nginx ends with it.
            sites[1].process.kill()
            wait_for(lambda: hosts(site) == ["127.0.0.4"])
        finally:
            over.append(True)
    assert all(each.exception() is None for each in running)
    assert set(statuses) == {200}
