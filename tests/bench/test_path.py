"""What the way around the model costs: how turns become one sentence."""

from __future__ import annotations

from bench.path import Lone, Turn, summary, threads_of


def test_ratios_are_of_the_turns_and_not_of_the_medians() -> None:
    turns = [
        Turn(100.0, 90.0, 400.0, 0, (Lone(32.0, 30.0), Lone(33.0, 30.0))),
        # A slow moment of the machine, which both sides of the turn had.
        Turn(50.0, 40.0, 900.0, 1, (Lone(61.0, 60.0),)),
        Turn(110.0, 88.0, 410.0, 0, (Lone(33.0, 29.0), Lone(34.0, 28.0))),
    ]
    found = summary(turns)
    assert found["kept"] == 0.8
    assert (found["served_ms"], found["alone_ms"], found["added_ms"]) == (33.0, 30.0, 3.0)
    assert found["failed"] == 1
    assert (found["alone_per_second"], found["served_per_second"]) == (100.0, 88.0)


def test_both_sides_take_the_threads_of_the_server() -> None:
    assert threads_of({"threads": {"value": "1"}, "lone_threads": {"value": "2"}}) == (1, 2)
    assert threads_of({"threads": {"value": "4"}}) == (4, 4)
