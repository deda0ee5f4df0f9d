"""What is shown while a load runs: a redrawn view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io

from rich.console import Console

from bench.load.connection import Exchange
from bench.load.live import bars, phase, view, watching
from bench.load.outcome import Outcome
from bench.load.plan import Plan
from tests.bench.load.conftest import PICTURES


def outcome(now: float = 104.0) -> Outcome:
    """Return one at four of ten seconds: 30 good answers in batches of 3 and 8, 10 refusals."""
    made = Outcome(Plan("http://127.0.0.1:1/predictions/x", PICTURES, rate=10.0))
    made.begin, made.end, made.now = 100.0, 110.0, now
    made.waiting = [(101.0, 3), (102.0, 4)]
    for index in range(40):
        exchange = Exchange(101.0, b"")
        exchange.end, exchange.status = 101.1, 200 if index < 30 else 429
        exchange.headers = {b"x-batch-size": b"8" if index < 20 else b"3"} if index < 30 else {}
        made.add(exchange)
    return made


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=120, color_system=None), out


def test_the_view_has_rate_percentiles_codes_and_the_histogram() -> None:
    screen, out = console(terminal=True)
    screen.print(view(outcome(), 12.0))
    text = out.getvalue()
    for words in ("12 answers/s now, 10.0 on average", "p50 100.0 ms, p95 100.0 ms, p99 100.0 ms", "4 of 10 s"):
        assert words in text
    assert "30 times 200, 10 times 429" in text
    assert "4 requests" in text
    assert text.index("\n3  █") < text.index("\n8  ██")
    assert "66.7%" in text


def test_a_terminal_is_redrawn_and_left_clean() -> None:
    screen, out = console(terminal=True)
    with watching(screen) as watch:
        watch(outcome())
        watch(outcome(105.0))
    assert "4 of 10 s" in out.getvalue()
    assert "5 of 10 s" in out.getvalue()
    assert "\x1b[" in out.getvalue()


def test_elsewhere_there_are_plain_lines() -> None:
    screen, out = console(terminal=False)
    with watching(screen) as watch:
        for now in (99.0, 100.5, 102.5, 103.0, 105.0):
            watch(outcome(now))
    lines = out.getvalue().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["2 of 10 s", "5 of 10 s"]
    assert "30 times 200, 10 times 429" in lines[0]
    assert "\x1b" not in out.getvalue()


def test_each_phase_is_named() -> None:
    assert [phase(outcome(now)) for now in (99.0, 101.0, 110.0)] == [
        "warming up",
        "1 of 10 s",
        "waiting for the last answers",
    ]


def test_bars_are_in_the_order_of_sizes() -> None:
    assert [(size, len(bar), share) for size, bar, share in bars({"16": 10, "8": 5, "9": 0})] == [
        ("8", 20, "33.3%"),
        ("9", 1, "0.0%"),
        ("16", 40, "66.7%"),
    ]
