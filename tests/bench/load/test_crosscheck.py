"""The same load by `ab` and `wrk`: real ones, on a small real server; which of them can make which load."""

from __future__ import annotations

import asyncio
import shutil

import pytest

from beeline.errors import Undetermined
from bench.load import crosscheck
from bench.load.crosscheck import CrossCheck, cross_check, tool_for, wrk
from bench.pictures import Pictures
from tests.bench.load.conftest import PICTURES, Arrival, Serve, answer, good, plan

ONE = Pictures("a.jpg", ("a.jpg",), (b"picture" * 1000,))


@pytest.mark.server
@pytest.mark.parametrize(("tool", "pictures"), [("ab", ONE), ("wrk", PICTURES)])
def test_it_takes_turns_and_has_a_ratio(
    serve: Serve, tool: str, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    free = asyncio.Semaphore(2)

    async def respond(arrival: Arrival) -> bytes:
        # Two at a time, each after 20 ms: the rate is the same for every client.
        async with free:
            await asyncio.sleep(0.02)
        return answer(b"{}", "200 OK", *(["Connection: keep-alive"] if "HTTP/1.0" in arrival.head else []))

    monkeypatch.setattr(crosscheck, "_SHORTEST", 1.0)
    server = serve(respond)
    found = cross_check(plan(server, pictures=pictures, clients=4), latency=0.04, rounds=1)
    assert found.tool == tool
    # Not a timing: a tool that counts wrongly, or sends something else, is far off.
    assert 0.5 < found.ratio < 2
    assert {arrival.body for arrival in server.arrivals} == set(pictures.bodies)
    assert any("ApacheBench" in arrival.head for arrival in server.arrivals) is (tool == "ab")


@pytest.mark.server
def test_wrk_counts_what_is_not_200(serve: Serve) -> None:
    if shutil.which("wrk") is None:
        pytest.skip("wrk is not installed")

    async def refuse(arrival: Arrival) -> bytes:
        await asyncio.sleep(0.01)
        return answer(b"{}", "503 Busy" if arrival.index % 2 else "200 OK")

    server = serve(refuse)
    assert 0 < wrk(plan(server, clients=2, seconds=1.0)).failed < len(server.arrivals)


def test_a_tool_that_cannot_is_not_asked(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(good)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert tool_for(plan(server, clients=1, pictures=ONE)) == "ab"
    assert tool_for(plan(server, clients=1)) == "wrk"
    with pytest.raises(Undetermined, match=r"an answer takes 9\.5 s, too long"):
        cross_check(plan(server, clients=1), latency=9.5)
    with pytest.raises(Undetermined, match="intended start"):
        tool_for(plan(server, rate=1.0))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(Undetermined, match="apt-get install"):
        tool_for(plan(server, clients=1))


def test_within_five_per_cent_they_agree() -> None:
    assert CrossCheck("ab", 100.0, 1.05).close
    assert not CrossCheck("ab", 100.0, 0.94).close
