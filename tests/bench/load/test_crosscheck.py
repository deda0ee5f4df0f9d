"""The same load by `ab`: a real one, on a small real server; which loads it can make."""

from __future__ import annotations

import asyncio
import shutil

import pytest

from beeline.errors import Undetermined
from bench.load import crosscheck
from bench.load.crosscheck import ab, check_possible, cross_check
from bench.pictures import Pictures
from tests.bench.load.conftest import Arrival, Serve, answer, good, plan

ONE = Pictures("a.jpg", ("a.jpg",), (b"picture" * 1000,))


@pytest.mark.server
@pytest.mark.skipif(shutil.which("ab") is None, reason="ab is not installed")
def test_ab_sends_the_same_picture_counts_failures_and_takes_turns(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = asyncio.Semaphore(2)

    async def respond(arrival: Arrival) -> bytes:
        # Two at a time, each after 20 ms: the rate is the same for every client.
        async with free:
            await asyncio.sleep(0.02)
        return answer(b"{}", "503 Busy" if arrival.index in (0, 1) else "200 OK", "Connection: keep-alive")

    monkeypatch.setattr(crosscheck, "_SHORTEST", 1.0)
    server = serve(respond)
    load = plan(server, pictures=ONE, clients=4)
    assert ab(load.url, ONE.bodies[0], 20, 4)[1] == 2
    # Not a timing: a tool that counts wrongly, or sends something else, is far off.
    assert 0.5 < cross_check(load, latency_ms=40, rounds=1)["ratio"] < 2
    assert {arrival.body for arrival in server.arrivals} == set(ONE.bodies)
    assert any("ApacheBench" in arrival.head for arrival in server.arrivals)


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


@pytest.mark.parametrize(("rate", "ratio", "agree"), [(100.0, 1.05, True), (100.0, 0.94, False)])
def test_within_five_per_cent_they_agree(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, rate: float, ratio: float, agree: bool
) -> None:
    class Ours:
        def summary(self) -> dict[str, float]:
            return {"per_second": rate * ratio}

    monkeypatch.setattr(crosscheck, "run", lambda plan: Ours())
    monkeypatch.setattr(crosscheck, "ab", lambda *given: (rate, 0))
    assert cross_check(plan(serve(good), clients=1, pictures=ONE), latency_ms=1) == {
        **{"tool": "ab", "per_second": rate, "ratio": ratio, "agree": agree}
    }
