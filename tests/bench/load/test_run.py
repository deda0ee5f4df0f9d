"""The load on small real servers that are slow, cut connections or answer in every legal way; and its figures."""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import Any

import pytest

import bench.load
from beeline.errors import ConfigError
from bench.load import Outcome, Plan, run
from tests.bench.load.conftest import PICTURES, Arrival, Serve, always, answer, good, outcome, plan


def test_each_client_keeps_its_connection_and_sends_the_pictures_in_turn(serve: Serve) -> None:
    server = serve(good)
    found = run(plan(server, clients=3)).summary()
    assert found["failed"] == 0
    assert found["requests"] == found["statuses"]["200"] > 3
    assert server.most_open == 3
    counts = {hashlib.sha256(body).digest(): 0 for body in PICTURES.bodies}
    for arrival in server.arrivals:
        counts[hashlib.sha256(arrival.body).digest()] += 1
    assert max(counts.values()) - min(counts.values()) <= 1
    first = server.arrivals[0].head
    assert first.startswith("POST /predictions/x HTTP/1.1\r\n")
    types = {arrival.head.split("Content-Type: ")[1].split("\r\n")[0] for arrival in server.arrivals}
    assert types == {"image/jpeg", "image/png", "application/octet-stream"}


CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1\r\nd\r\n0\r\n\r\n"
CLOSING = ("200 OK", "Connection: close")


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (CHUNKS, None),
        (answer(b"{}", *CLOSING), None),
        (answer(b"{}", *CLOSING, length=False), None),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + answer(), None),
        (answer(b""), None),
        (None, "Disconnected"),
        (answer(b"x" * 100, *CLOSING)[:-50], "Disconnected"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nX-Half", "Disconnected"),
        (b"220 mail.example ESMTP\r\nconnection: close", "BadAnswer"),
    ],
)
def test_every_legal_form_of_an_answer_is_one_and_a_broken_one_is_an_error_by_its_name(
    serve: Serve, sent: bytes | None, error: str | None
) -> None:
    found = run(plan(serve(always(sent)), clients=2)).summary()
    assert found["requests"] > 2
    assert found["failed"] == (found["requests"] if error else 0)
    assert set(found["errors"]) == ({error} if error else set())
    assert (found["p95_ms"] is None) is (found["good_per_second"] == 0) is (error is not None)


def test_a_request_that_meets_a_closing_connection_is_sent_again_but_not_twice(serve: Serve) -> None:
    async def once(arrival: Arrival) -> bytes | None:
        return answer() if arrival.turn == 0 else None

    assert run(plan(serve(once), clients=2)).summary()["failed"] == 0

    async def respond(arrival: Arrival) -> bytes | None:
        return answer() if arrival.index == 0 else None

    found = run(plan(serve(respond), clients=1, warm_up=0)).summary()
    assert found["statuses"] == {"200": 1}
    assert found["errors"]["Disconnected"] >= 1


def test_no_answer_within_the_deadline_is_a_timeout(serve: Serve) -> None:
    for how in ({"clients": 3}, {"rate": 20.0}):
        found = run(plan(serve(always(b"", 600)), deadline=0.3, **how)).summary()
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


def test_refusals_are_counted_and_retry_after_is_heeded_on_request(serve: Serve) -> None:
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
def test_open_loop_counts_from_when_a_request_was_due_also_where_no_connection_is_free(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, most_connections: int
) -> None:
    monkeypatch.setattr(bench.load, "_MOST_CONNECTIONS", most_connections)
    options: dict[str, Any] = {"seconds": 2.0, "warm_up": 0}
    closed = run(plan(serve(Stall()), clients=1, **options))
    opened = run(plan(serve(Stall()), rate=50.0, poisson=False, **options))

    def slow(outcome: Outcome) -> int:
        return sum(latency > 500 * Stall.SECONDS for latency in outcome.latencies)

    # The stall is one slow request of the client that waits, and 25 of those who come anyway.
    assert opened.summary()["failed"] == closed.summary()["failed"] == 0
    assert slow(closed) >= 1
    assert slow(opened) > 5 * slow(closed)
    assert max(opened.latencies) > 900 * Stall.SECONDS


def test_a_rate_that_is_too_high_is_reported_and_not_lowered(serve: Serve) -> None:
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


def test_arrivals_that_were_due_while_the_client_slept_count(serve: Serve) -> None:
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


def test_open_loop_opens_no_more_connections_than_it_may(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(always(answer(), 0.2))
    monkeypatch.setattr(bench.load, "_MOST_CONNECTIONS", 7)
    found = run(plan(server, rate=200.0)).summary()
    assert server.most_open == 7
    assert found["errors"]["NotSent"] > 0
    assert found["backlog"]["growing"]


def test_the_same_seed_is_the_same_load(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.load, "_MOST_CONNECTIONS", 1)

    def sent(seed: int) -> list[bytes]:
        server = serve(good)
        run(plan(server, rate=100.0, seed=seed, warm_up=0, seconds=0.3))
        return [arrival.body for arrival in server.arrivals]

    one, again = sent(1), sent(1)
    short = min(map(len, (one, again)))
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
        ({"clients": 1, "url": "127.0.0.1:8080"}, "the URL is"),
    ],
)
def test_an_impossible_plan_says_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Plan(**{"url": "http://127.0.0.1:1/", "pictures": PICTURES, **changes})


def test_percentiles_are_those_of_the_good_answers() -> None:
    made = outcome(111.0)
    for number in range(1, 102):
        made.add(101.0, 101.0 + number / 1000, 200)
    found = made.summary()
    assert [round(found[name]) for name in ("p50_ms", "p95_ms", "p99_ms", "max_ms")] == [51, 96, 100, 101]


def test_requests_count_by_their_start_and_rates_by_the_answers_end() -> None:
    made = outcome(111.0)
    for start, end in ((99.0, 99.5), (99.9, 100.1), (105.0, 106.0), (109.9, 112.0), (110.1, 112.0)):
        made.add(start, end, 200)
    found = made.summary()
    assert found["requests"] == 2  # begun in the measured time
    assert found["per_second"] == pytest.approx(2 / 10)  # answered in it
    assert found["max_ms"] == pytest.approx(2100)


def test_failures_are_all_that_is_not_200_and_only_200_have_a_latency() -> None:
    made = outcome(111.0)
    answers: tuple[int | str, ...] = (200, 429, 503, "Timeout")
    for end, status in zip((101.1, 103.0, 104.0, 105.0), answers, strict=True):
        made.add(101.0, end, status)
    found = made.summary()
    assert found["statuses"] == {"200": 1, "429": 1, "503": 1}
    assert found["errors"] == {"Timeout": 1}
    assert (found["requests"], found["failed"]) == (4, 3)
    assert found["per_second"] == pytest.approx(0.3)
    assert found["good_per_second"] == pytest.approx(0.1)
    assert found["max_ms"] == pytest.approx(100)
    assert "3 of 4 failed" in made.sentence()


def test_an_empty_one_has_no_percentiles() -> None:
    made = Outcome(Plan("http://127.0.0.1:1/", PICTURES, clients=1))
    found = made.summary()
    assert found["p50_ms"] is found["p95_ms"] is found["max_ms"] is found["backlog"] is None
    assert found["per_second"] == 0
    assert "0 of 0 failed" in made.sentence()


@pytest.mark.parametrize(
    ("name", "waiting", "growing"),
    [
        ("steady", lambda second: 20, False),
        ("a burst that is worked off", lambda second: 200 if 4 < second < 6 else 3, False),
        ("a tenth of 300 arrivals a second is left", lambda second: 10 + 30 * second, True),
        ("within chance of 300 arrivals a second", lambda second: 10 + 5 * second, False),
    ],
)
def test_a_backlog_grows_when_it_rises_by_more_than_chance(name: str, waiting: object, growing: bool) -> None:
    made = outcome(111.0, rate=300.0)
    assert callable(waiting)
    made.waiting = [(100 + tick / 10, int(waiting(tick / 10))) for tick in range(101)]
    backlog = made.summary()["backlog"]
    assert backlog["growing"] is growing, name
    assert backlog["at_end"] == made.waiting[-1][1]
    assert ("does not hold 300/s" in made.sentence()) is growing


def test_a_rate_that_is_held_only_with_failures_is_said() -> None:
    made = outcome(111.0, rate=300.0)
    made.waiting = [(100 + tick, 1) for tick in range(10)]
    made.add(101.0, 101.1, 429)
    assert made.sentence().endswith("the server does not hold 300/s without failures")
