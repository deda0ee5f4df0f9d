"""Ctrl-C, SIGTERM and a closed terminal, as one exception."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """A request to end this process. Not an `Exception`, so that no handler of errors catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.is_alarm = number == signal.SIGALRM
        # The status that a shell reports for a process that the signal ended.
        self.exit_code = 128 + number


@contextmanager
def as_exceptions(seconds: float | None = None) -> Iterator[None]:
    """Turn the first SIGINT, SIGTERM or SIGHUP inside the block into `Interrupted`, and ignore further ones.

    Under `nohup` SIGHUP stays ignored. With `seconds`, an alarm raises the same exception after that time.
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
    if seconds is not None:
        numbers.append(signal.SIGALRM)
    kept = {number: signal.signal(number, interrupt) for number in numbers}
    if seconds is not None:
        signal.setitimer(signal.ITIMER_REAL, max(0.1, seconds))
    try:
        yield
    finally:
        if seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in kept.items():
            signal.signal(number, handler)
