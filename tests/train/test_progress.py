"""Progress: a plain line now and then in a log, a bar on a terminal that is gone at the end."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

import train.progress
from train.progress import progress


@pytest.mark.parametrize(
    ("total", "shown", "expected"),
    [
        (50_000_000, ("MB", 1e6), ["step: 21 of 50 MB", "step: 42 of 50 MB"]),
        # An unknown total is not invented.
        (0, ("", 1e6), ["step: 21", "step: 42"]),
    ],
)
def test_without_a_terminal_a_line_is_said_every_thirty_seconds(
    monkeypatch: pytest.MonkeyPatch, total: int, shown: tuple[str, float], expected: list[str]
) -> None:
    now, said = [0.0], list[str]()
    monkeypatch.setattr("train.progress.time.monotonic", lambda: now[0])
    with progress("step", total, said.append, *shown) as step:
        for second in range(70):
            now[0] = second
            step(700_000 * second)
    assert said == expected


def test_on_a_terminal_a_bar_is_drawn_and_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, said = io.StringIO(), list[str]()
    terminal = Console(file=screen, force_terminal=True, width=80, _environ={})
    monkeypatch.setattr(train.progress, "Console", lambda stderr: terminal)
    with progress("download", 10_000_000, said.append, "MB", 1e6) as step:
        step(5_000_000)
        step(10_000_000)
    assert said == []
    assert "100%" in screen.getvalue()
    assert re.search(r"\d\.\d MB/s", screen.getvalue())
    assert re.search(r"\d:\d\d:\d\d", screen.getvalue()), "the time that is left"
    assert screen.getvalue().endswith("\x1b[1A\x1b[2K"), "the bar's line is cleared"
