"""The same load by `ab`: a real one, on a small real server; which loads it can make."""

from __future__ import annotations

import asyncio
import shutil

import pytest

from beeline.errors import Undetermined
from bench.load import crosscheck
from bench.load.crosscheck import CrossCheck, ab, check_possible, cross_check
from bench.pictures import Pictures
from tests.bench.load.conftest import Arrival, Serve, answer, good, plan

NEEDS_AB = pytest.mark.skipif(shutil.which("ab") is None, reason="ab is not installed")
ONE = Pictures("a.jpg", ("a.jpg",), (b"picture" * 1000,))


@pytest.mark.server
@NEEDS_AB
def test_it_takes_turns_and_has_a_ratio(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    free = asyncio.Semaphore(2)

    async def respond(arrival: Arrival) -> bytes:
        # Two at a time, each after 20 ms: the rate is the same for every client.
        async with free:
            await asyncio.sleep(0.02)
        return answer(b"{}", "200 OK", *(["Connection: keep-alive"] if "HTTP/1.0" in arrival.head else []))

    monkeypatch.setattr(crosscheck, "_SHORTEST", 1.0)
    server = serve(respond)
    # Not a timing: a tool that counts wrongly, or sends something else, is far off.
    assert 0.5 < cross_check(plan(server, pictures=ONE, clients=4), latency=0.04, rounds=1).ratio < 2
    assert {arrival.body for arrival in server.arrivals} == set(ONE.bodies)
    assert any("ApacheBench" in arrival.head for arrival in server.arrivals)


@pytest.mark.server
@NEEDS_AB
def test_what_is_not_200_has_failed(serve: Serve) -> None:
    async def refuse(arrival: Arrival) -> bytes:
        return answer(b"{}", "503 Busy" if arrival.index % 2 else "200 OK", "Connection: keep-alive")

    assert ab(plan(serve(refuse), clients=2).url, ONE.bodies[0], 20, 1)[1] == 10


def test_a_load_that_ab_cannot_make_is_refused(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(good)
    one = plan(server, clients=1, pictures=ONE)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    check_possible(one)
    for other in (plan(server, rate=1.0, pictures=ONE), plan(server, clients=1)):
        with pytest.raises(Undetermined, match="one --picture"):
            check_possible(other)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(Undetermined, match="apt-get install"):
        check_possible(one)


def test_within_five_per_cent_they_agree() -> None:
    assert CrossCheck(100.0, 1.05).close
    assert not CrossCheck(100.0, 0.94).close
