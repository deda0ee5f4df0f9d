"""Make the load: an event loop of its own, closed loop or open loop, that ends with nothing left open."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvloop

from beeline.errors import Undetermined
from bench.load.generator import Generator, Watch
from bench.load.outcome import Outcome
from bench.load.plan import Plan

_CONNECT_SECONDS = 5.0
# The signals that end it.
_HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(plan: Plan, watch: Watch | None = None, outcome: Outcome | None = None) -> Outcome:
    """Make the load and wait for its end.

    Ctrl-C and SIGTERM end it at once; then what they are to do is done (mostly: an exception), and a caller
    that gave the `outcome` has in it what was measured until then.

    Args:
        plan: what to do.
        watch: called about twice a second with the outcome so far; what it takes, the load waits.
        outcome: to fill; a new one by default.

    Raises:
        Undetermined: when nothing listens at the address.
    """
    outcome = outcome or Outcome(plan)
    asked: list[int] = []
    load = Generator(plan, outcome, watch, _reach(plan))
    with _heard(load, asked) as handlers:
        loop = uvloop.new_event_loop()
        try:
            loop.run_until_complete(load.drive())
        finally:
            loop.close()
    if asked:
        handler = handlers[asked[0]]
        assert callable(handler)
        handler(asked[0], None)
    return outcome


def _reach(plan: Plan) -> tuple[str, int]:
    """Return the first of the name's addresses that takes a connection, so that none is looked up on the way."""
    host, port = plan.address
    why: OSError | None = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.settimeout(_CONNECT_SECONDS)
                try:
                    probe.connect(address)
                except OSError as error:
                    why = error
                else:
                    return str(address[0]), port
    except OSError as error:
        why = error
    raise Undetermined(f"nothing answers at {host}:{port} ({why}); start a server, or give another URL") from why


@contextmanager
def _heard(load: Generator, asked: list[int]) -> Iterator[dict[int, Callable[[int, FrameType | None], object]]]:
    """Let the signals that have a Python handler end the load instead; yield those handlers."""
    handlers: dict[int, Callable[[int, FrameType | None], object]] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {int(number): kept for number in _HEARD if callable(kept := signal.getsignal(number))}

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        load.interrupt()

    for number in handlers:
        signal.signal(number, ask)
    try:
        yield handlers
    finally:
        for number, kept in handlers.items():
            signal.signal(number, kept)
