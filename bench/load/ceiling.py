"""What the client itself can do, measured first: the same pictures to a server that does nothing."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from beeline.errors import Undetermined
from bench.load.outcome import Outcome
from bench.load.plan import Plan
from bench.load.run import run
from host import ROOT, processes

_SECONDS, _WARM_UP = 1.5, 0.3
# Connections to measure an open loop's client with.
_CLIENTS = 50
# From these shares on the client is the limit: of its ceiling, of one core; of the latency's p99, its own lateness's.
_NEAR, _BUSY, _LATE = 0.8, 0.9, 0.3


@dataclass(frozen=True)
class Ceiling:
    """Answers a second from a server that does nothing, and the client's share of a core meanwhile."""

    per_second: float
    client_cpu: float


def measure(plan: Plan, answer_bytes: int) -> Ceiling:
    """Send the plan's pictures to a trivial server in a process of its own, in closed loop.

    Args:
        plan: whose pictures, clients and headers.
        answer_bytes: what the real server answers with, head and body.

    Raises:
        Undetermined: when the trivial server does not start.
    """
    with trivial(answer_bytes) as port:
        there = dataclasses.replace(
            plan,
            url=f"http://127.0.0.1:{port}{plan.parts.path}",
            clients=plan.clients or _CLIENTS,
            rate=None,
            seconds=_SECONDS,
            warm_up=_WARM_UP,
        )
        found = run(there).summary()
    return Ceiling(found["per_second"], found["client_cpu"])


def limits(outcome: Outcome, ceiling: Ceiling) -> str | None:
    """Return why the client, and not the server, is what was measured; None where it is not."""
    found = outcome.summary()
    wanted = max(found["per_second"], outcome.plan.rate or 0.0)
    if wanted >= _NEAR * ceiling.per_second:
        return (
            f"the client is the limit: {wanted:.0f} requests/s are {wanted / ceiling.per_second:.0%} of the "
            f"{ceiling.per_second:.0f} that it makes with a server that does nothing"
        )
    if found["client_cpu"] >= _BUSY:
        return f"the client is the limit: it used {found['client_cpu']:.0%} of one core, and has no second"
    late, latency = found["late_ms"], found["p99_ms"]
    if late is not None and latency is not None and late > max(2.0, _LATE * latency):
        return (
            f"the client is the limit: {late:.1f} ms of the p99 of {latency:.1f} ms are its own lateness, so that it "
            "needs a processor of its own"
        )
    return None


@contextmanager
def trivial(answer_bytes: int) -> Iterator[int]:
    """Run the trivial server; yield its port, and end it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.load.trivial", str(answer_bytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        # Out of reach of the terminal's Ctrl-C, which this process hears; its stdin ends it with this process.
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line.strip().isdigit():
            raise Undetermined("the trivial server that the client's own ceiling is measured with does not start")
        yield int(line)
    finally:
        processes.end_group(process)
