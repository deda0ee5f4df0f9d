"""The client's own ceiling: measured with a real trivial server that ends, and when it is the limit."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import psutil
import pytest
import requests

from bench.load import ceiling
from bench.load.ceiling import Ceiling, limits, measure, trivial
from bench.load.connection import Exchange
from bench.load.outcome import Outcome
from bench.load.plan import Plan
from host import ROOT
from tests.bench.load.conftest import PICTURES

# Ends without leaving its block.
_KILLED = """
import os, psutil
from bench.load.ceiling import trivial
with trivial(100):
    print(psutil.Process().children()[0].pid, flush=True)
    os._exit(1)
"""


def plan(**changes: float) -> Plan:
    return Plan("http://127.0.0.1:1/predictions/x", PICTURES, **(changes or {"clients": 2}))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [300, 70_000])
def test_the_trivial_server_answers_whole_requests_with_so_many_bytes(size: int) -> None:
    with trivial(size) as port, requests.Session() as session:
        for body in (*PICTURES.bodies, b"", os.urandom(700_000), b"\r\n\r\n" * 5000):
            found = session.post(f"http://127.0.0.1:{port}/x", data=body, timeout=30)
            assert found.status_code == 200
            assert (
                size - 5
                < len(found.content) + sum(len(a) + len(b) + 4 for a, b in found.headers.items()) + 17
                < size + 5
            )


def test_the_trivial_server_ends_with_the_block_and_with_whoever_started_it() -> None:
    with trivial(100):
        (child,) = [each for each in psutil.Process().children() if "bench.load.trivial" in each.cmdline()]
    assert not child.is_running()
    said = subprocess.run([sys.executable, "-c", _KILLED], cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(said)).wait(30)


@pytest.mark.parametrize("how", [{"clients": 2}, {"rate": 50.0}])
def test_it_is_measured_with_the_same_pictures(how: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "_SECONDS", 0.3)
    own = measure(plan(**how), 300)
    assert own.per_second > 50
    assert own.client_cpu > 0


def outcome(answers: int, cpu: float = 0.1, **changes: float) -> Outcome:
    made = Outcome(plan(**changes))
    made.begin, made.end, made.now, made.cpu = 0.0, 10.0, 11.0, 10 * cpu
    for _ in range(answers):
        exchange = Exchange(1.0, b"")
        exchange.end, exchange.status = 1.05, 200
        made.add(exchange)
    return made


def test_a_server_far_below_the_ceiling_is_what_was_measured() -> None:
    assert limits(outcome(1000), Ceiling(2000.0, 1.0)) is None
    assert limits(outcome(1000, rate=100.0), Ceiling(2000.0, 1.0)) is None


def test_near_the_ceiling_or_without_processor_left_it_is_the_client() -> None:
    near = limits(outcome(1700), Ceiling(200.0, 1.0))
    assert near is not None
    assert "85% of the 200" in near
    # A rate that it cannot even send is its own fault, however few answers there were.
    assert "the client is the limit" in str(limits(outcome(100, rate=190.0), Ceiling(200.0, 1.0)))
    assert "used 95% of one core" in str(limits(outcome(1000, cpu=0.95), Ceiling(2000.0, 1.0)))


def test_lateness_of_its_own_in_the_latencies_is_the_client() -> None:
    made = outcome(100, rate=10.0)
    made.late.extend([1.0] * 100)
    assert limits(made, Ceiling(2000.0, 1.0)) is None
    made.late.extend([30.0] * 100)
    assert "its own lateness" in str(limits(made, Ceiling(2000.0, 1.0)))
