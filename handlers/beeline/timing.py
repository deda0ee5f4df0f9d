"""Where a request's time went: milliseconds by stage, the `Server-Timing` header, the time in the queue."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Spans:
    """Milliseconds by name, in the order in which they were first measured."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, (time.perf_counter() - start) * 1000)

    def add(self, name: str, milliseconds: float) -> None:
        """Add to `name`."""
        self.milliseconds[name] = self.milliseconds.get(name, 0.0) + milliseconds


def server_timing(milliseconds: Mapping[str, float]) -> str:
    """Return the value of a `Server-Timing` header: `decode;dur=2.31, forward;dur=9.80`."""
    return ", ".join(f"{name};dur={value:.2f}" for name, value in milliseconds.items())


def queue_milliseconds(request_start: object, now: float | None = None) -> float | None:
    """Return the time since `X-Request-Start`, which the gateway sets; None without a believable one.

    Args:
        request_start: seconds since the epoch, as `t=1700000000.123` or without the `t=`.
        now: seconds since the epoch, for tests.
    """
    if not isinstance(request_start, str):
        return None
    try:
        waited = (time.time() if now is None else now) - float(request_start.removeprefix("t="))
    except ValueError:
        return None
    # Over an hour, or a negative time, is another clock or another unit: omitted, never guessed.
    return waited * 1000 if 0 <= waited < 3600 else None
