"""Progress: nothing but plain lines where nobody watches, and a bar that is gone where somebody does."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import train.progress
from train.progress import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("train.progress.time.monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_line_is_said_every_thirty_seconds(clock: list[float]) -> None:
    said: list[str] = []
    with progress("download", 50_000_000, said.append, "MB", 1e6) as step:
        for second in range(70):
            clock[0] = second
            step(700_000 * second)
    assert said == ["download: 21 of 50 MB", "download: 42 of 50 MB"]


def test_an_unknown_total_is_not_invented(clock: list[float]) -> None:
    said: list[str] = []
    with progress("epoch 1/2", 0, said.append) as step:
        clock[0] = 31
        step(7)
    assert said == ["epoch 1/2: 7"]


def test_on_a_terminal_a_bar_is_drawn_and_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        train.progress, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=80, _environ={})
    )
    said: list[str] = []
    with progress("download", 10, said.append) as step:
        step(10)
    assert said == []
    assert "100%" in screen.getvalue()
    assert screen.getvalue().endswith("\x1b[1A\x1b[2K"), "the bar's line is cleared"
