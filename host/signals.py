"""Ctrl-C, SIGTERM and a closed terminal, as one exception."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """Somebody asked this process to end; no `Exception`, so that nothing takes it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        # What a shell reports of a process that the signal ended.
        self.exit_code = 128 + number


@contextmanager
def as_exceptions() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into `Interrupted` inside the block; a second one meanwhile changes nothing.

    Under `nohup` SIGHUP stays ignored.
    """
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if not interrupted:
            interrupted = True
            raise Interrupted(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    kept = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
