"""The load itself, on small real servers that are slow, cut connections or answer in every legal way."""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import Any

import pytest

from beeline.errors import ConfigError, Undetermined
from bench.load import Outcome, Plan, run
from tests.bench.load.conftest import PICTURES, Arrival, Serve, answer, good, plan


def test_each_client_keeps_its_connection_and_sends_the_pictures_in_turn(serve: Serve) -> None:
    server = serve(good)
    found = run(plan(server, clients=3)).summary()
    assert found["failed"] == 0
    assert found["requests"] == found["statuses"]["200"] > 3
    assert server.most_open <= 4  # with the one that asks whether anybody listens
    counts = {hashlib.sha256(body).digest(): 0 for body in PICTURES.bodies}
    for arrival in server.arrivals:
        counts[hashlib.sha256(arrival.body).digest()] += 1
    assert max(counts.values()) - min(counts.values()) <= 1
    first = server.arrivals[0].head
    assert first.startswith("POST /predictions/x HTTP/1.1\r\n")
    assert {a.head.split("Content-Type: ")[1].split("\r\n")[0] for a in server.arrivals} == {
        "image/jpeg",
        "image/png",
        "application/octet-stream",
    }


async def chunked(arrival: Arrival) -> bytes:
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1\r\nd\r\n0\r\n\r\n"


async def closing(arrival: Arrival) -> bytes:
    return answer(b"{}", "200 OK", "Connection: close")


async def until_closed(arrival: Arrival) -> bytes:
    return answer(b"{}", "200 OK", "Connection: close", length=False)


async def announced(arrival: Arrival) -> bytes:
    return b"HTTP/1.1 100 Continue\r\n\r\n" + answer()


async def without_a_body(arrival: Arrival) -> bytes:
    return answer(b"")


@pytest.mark.parametrize("respond", [chunked, closing, until_closed, announced, without_a_body])
def test_every_legal_form_of_an_answer_is_one(serve: Serve, respond: Any) -> None:
    server = serve(respond)
    found = run(plan(server, clients=2)).summary()
    assert found["errors"] == {}
    assert found["failed"] == 0
    assert found["statuses"]["200"] > 2


async def cut(arrival: Arrival) -> None:
    return None


async def half(arrival: Arrival) -> bytes:
    return answer(b"x" * 100, "200 OK", "Connection: close")[:-50]


async def half_a_head(arrival: Arrival) -> bytes:
    return b"HTTP/1.1 200 OK\r\nConnection: close\r\nX-Half"


async def no_http(arrival: Arrival) -> bytes:
    return b"220 mail.example ESMTP\r\nconnection: close"


@pytest.mark.parametrize(
    ("respond", "name"),
    [(cut, "Disconnected"), (half, "Disconnected"), (half_a_head, "Disconnected"), (no_http, "BadAnswer")],
)
def test_a_broken_answer_is_an_error_by_its_name(serve: Serve, respond: Any, name: str) -> None:
    found = run(plan(serve(respond), clients=2)).summary()
    assert set(found["errors"]) == {name}
    assert found["failed"] == found["requests"] > 2
    assert found["good_per_second"] == 0
    assert found["p95_ms"] is None


def test_a_request_that_meets_a_closing_connection_is_sent_again(serve: Serve) -> None:
    async def once(arrival: Arrival) -> bytes | None:
        return answer() if arrival.turn == 0 else None

    found = run(plan(serve(once), clients=2)).summary()
    assert found["failed"] == 0


def test_a_request_that_is_cut_off_twice_has_failed(serve: Serve) -> None:
    async def respond(arrival: Arrival) -> bytes | None:
        return answer() if arrival.index == 0 else None

    found = run(plan(serve(respond), clients=1, warm_up=0)).summary()
    assert found["statuses"] == {"200": 1}
    assert found["errors"]["Disconnected"] >= 1


def test_no_answer_within_the_deadline_is_a_timeout(serve: Serve) -> None:
    async def never(arrival: Arrival) -> bytes:
        await asyncio.sleep(600)
        return b""

    for how in ({"clients": 3}, {"rate": 20.0}):
        found = run(plan(serve(never), deadline=0.3, **how)).summary()
        assert set(found["errors"]) <= {"Timeout", "NotSent"}
        assert found["errors"]["Timeout"] == found["failed"] > 0


def test_a_server_that_stops_listening_is_refused_connections(serve: Serve) -> None:
    async def respond(arrival: Arrival) -> bytes:
        if arrival.index == 3:
            server.refuse()
        return answer(b"{}", "200 OK", "Connection: close")

    server = serve(respond)
    found = run(plan(server, clients=2, warm_up=0)).summary()
    assert found["errors"]["Refused"] > 0
    assert 4 <= found["statuses"]["200"] < 8


def test_nothing_that_listens_is_undetermined() -> None:
    with pytest.raises(Undetermined, match=r"nothing answers at 127\.0\.0\.1:1 "):
        run(Plan("http://127.0.0.1:1/predictions/x", PICTURES, clients=1))


def test_refusals_are_counted_as_what_they_are_and_heeded_when_asked(serve: Serve) -> None:
    async def refuse(arrival: Arrival) -> bytes:
        told = ("Retry-After: 1",) if arrival.index % 2 else ()
        return answer(b"{}", "200 OK") if arrival.index == 0 else answer(b"{}", "429 Too Many Requests", *told)

    rude = run(plan(serve(refuse), clients=4, warm_up=0)).summary()
    polite = run(plan(serve(refuse), clients=4, warm_up=0, heed_retry_after=True)).summary()
    assert rude["errors"] == polite["errors"] == {}
    assert rude["statuses"]["200"] == polite["statuses"]["200"] == 1
    assert rude["failed"] == rude["statuses"]["429"] > polite["statuses"]["429"]
    assert 0 < rude["without_retry_after"] < rude["statuses"]["429"]


def test_batch_sizes_and_timings_are_read_from_the_headers(serve: Serve) -> None:
    async def respond(arrival: Arrival) -> bytes:
        size = 8 if arrival.index % 4 else 3
        timing = "Server-Timing: queue;dur=4.00, decode;dur=2.50, forward;dur=9.80, other;dur=1, encode;dur=x"
        return answer(b"{}", "200 OK", f"X-Batch-Size: {size}", timing)

    found = run(plan(serve(respond), clients=2)).summary()
    assert set(found["batch_sizes"]) == {"3", "8"}
    assert found["batch_sizes"]["8"] > found["batch_sizes"]["3"]
    assert found["timing_ms"] == {"queue": 4.0, "decode": 2.5, "forward": 9.8, "encode": None}


class Stall:
    """Answers at once, except that everything waits for a while from the tenth request on, once."""

    SECONDS = 1.0

    def __init__(self) -> None:
        self.free = asyncio.Event()
        self.free.set()

    async def __call__(self, arrival: Arrival) -> bytes:
        if arrival.index == 10:
            self.free.clear()
            await asyncio.sleep(self.SECONDS)
            self.free.set()
        await self.free.wait()
        return answer()


@pytest.mark.parametrize("most_connections", [1, 512])
def test_open_loop_counts_from_the_intended_start_also_where_no_connection_is_free(
    serve: Serve, most_connections: int
) -> None:
    options: dict[str, Any] = {"seconds": 2.0, "warm_up": 0}
    closed = run(plan(serve(Stall()), clients=1, **options))
    opened = run(plan(serve(Stall()), rate=50.0, poisson=False, most_connections=most_connections, **options))

    def slow(outcome: Outcome) -> int:
        return sum(latency > 500 * Stall.SECONDS for latency in outcome.latencies)

    # The stall is one slow request of the client that waits, and 25 of those who come anyway.
    assert opened.summary()["failed"] == closed.summary()["failed"] == 0
    assert slow(closed) >= 1
    assert slow(opened) > 5 * slow(closed)
    assert max(opened.latencies) > 900 * Stall.SECONDS


def test_a_rate_that_cannot_be_held_is_said_and_never_slowed_down_for(serve: Serve) -> None:
    def slow() -> Any:
        alone = asyncio.Semaphore(1)

        async def respond(arrival: Arrival) -> bytes:
            async with alone:
                await asyncio.sleep(0.02)
            return answer()

        return respond

    options: dict[str, Any] = {"seconds": 1.0, "warm_up": 0.2, "poisson": False}
    over = run(plan(serve(slow()), rate=120.0, **options))
    held = run(plan(serve(slow()), rate=5.0, **options))
    found = over.summary()
    assert 119 <= found["requests"] <= 121
    assert found["backlog"]["growing"]
    assert found["backlog"]["per_second"] > 30
    assert found["backlog"]["at_end"] > 40
    assert found["per_second"] < 0.5 * 120
    assert "does not hold 120/s" in over.sentence()
    assert "the client is the limit" in over.sentence("the client is the limit")
    assert "does not hold" not in over.sentence("the client is the limit")
    assert held.summary()["backlog"]["growing"] is False
    assert "does not hold" not in held.sentence()


def test_what_was_due_while_the_client_slept_is_sent_late_and_counts(serve: Serve) -> None:
    slept: list[float] = []

    def sleep_over_the_end(outcome: Outcome) -> None:
        left = outcome.end - time.perf_counter()
        if not slept and left < 1.2:
            slept.append(left)
            time.sleep(max(0, left) + 0.1)

    found = run(plan(serve(good), rate=100.0, poisson=False, seconds=2.0), sleep_over_the_end).summary()
    assert slept
    assert 199 <= found["requests"] <= 201
    assert found["late_ms"] > 200


def test_open_loop_opens_no_more_connections_than_it_says(serve: Serve) -> None:
    async def slow(arrival: Arrival) -> bytes:
        await asyncio.sleep(0.2)
        return answer()

    server = serve(slow)
    found = run(plan(server, rate=200.0, most_connections=7)).summary()
    assert server.most_open <= 8  # with the one that asks whether anybody listens
    assert found["errors"]["NotSent"] > 0
    assert found["backlog"]["growing"]


def test_the_same_seed_is_the_same_load(serve: Serve) -> None:
    def sent(seed: int) -> list[bytes]:
        server = serve(good)
        run(plan(server, rate=100.0, seed=seed, most_connections=1, warm_up=0, seconds=0.3))
        return [arrival.body for arrival in server.arrivals]

    one, again, other = sent(1), sent(1), sent(2)
    short = min(map(len, (one, again, other)))
    assert one[:short] == again[:short]
    assert short > 10
    assert len(one) == len(again)


def test_the_watcher_sees_it_grow_and_its_error_ends_the_load(serve: Serve) -> None:
    seen: list[int] = []
    outcome = run(plan(serve(good), clients=1, seconds=1.6), lambda so_far: seen.append(so_far.answers))
    assert len(seen) >= 2
    assert seen == sorted(seen)
    assert outcome.answers >= seen[-1]

    def broken(so_far: Outcome) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(plan(serve(good), clients=1, seconds=600), broken)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "either clients"),
        ({"clients": 1, "rate": 1.0}, "either clients"),
        ({"clients": 0}, "clients is 0"),
        ({"rate": -2.0}, "rate is -2"),
        ({"clients": 1, "seconds": 0}, "seconds is 0"),
        ({"clients": 1, "warm_up": -1}, "warm_up is -1"),
        ({"clients": 2000}, "clients is 2000; give at most 900"),
        ({"clients": 1, "url": "127.0.0.1:8080"}, "the URL is"),
    ],
)
def test_an_impossible_plan_says_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Plan(**{"url": "http://127.0.0.1:1/", "pictures": PICTURES, **changes})
