"""Requests to end become one exception, once."""

from __future__ import annotations

import os
import signal

import pytest

from host.signals import Interrupted, as_exceptions


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_becomes_an_exception_and_a_second_one_changes_nothing(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    reached = False
    with as_exceptions():
        with pytest.raises(Interrupted) as caught:
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        reached = True
    assert reached
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) is before


def test_under_nohup_a_closed_terminal_is_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with as_exceptions():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
