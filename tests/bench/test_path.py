"""What the way around the model costs: how turns become one sentence."""

from __future__ import annotations

from bench.path import Turn, summary


def test_ratios_are_of_the_turns_and_not_of_the_medians() -> None:
    turns = [
        Turn(100.0, 90.0, 30.0, 32.0, 400.0, 0),
        # A slow moment of the machine, which both sides of the turn had.
        Turn(50.0, 40.0, 60.0, 61.0, 900.0, 1),
        Turn(110.0, 88.0, 29.0, 33.0, 410.0, 0),
    ]
    found = summary(turns)
    assert found["kept"] == 0.8
    assert found["added_ms"] == 2.0
    assert found["failed"] == 1
    assert (found["alone_per_second"], found["served_per_second"]) == (100.0, 88.0)
