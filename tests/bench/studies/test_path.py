"""What the way around the model costs: how turns become one sentence."""

from __future__ import annotations

from typing import Any

from bench.studies.path import summary, threads_of


def turn(alone: float, served: float, p95_ms: float, failed: int, lone: list[tuple[float, float]]) -> dict[str, Any]:
    figures = {"alone_per_second": alone, "served_per_second": served, "served_p95_ms": p95_ms}
    return {**figures, "failed": failed, "lone": lone}


def test_ratios_are_of_the_turns_and_not_of_the_medians() -> None:
    turns = [
        turn(100.0, 90.0, 400.0, 0, [(32.0, 30.0), (33.0, 30.0)]),
        # A slow moment of the machine, which both sides of the turn had.
        turn(50.0, 40.0, 900.0, 1, [(61.0, 60.0)]),
        turn(110.0, 88.0, 410.0, 0, [(33.0, 29.0), (34.0, 28.0)]),
    ]
    values = summary(turns)
    assert values["kept"] == 0.8
    assert (values["served_ms"], values["alone_ms"], values["added_ms"]) == (33.0, 30.0, 3.0)
    assert values["failed"] == 1
    assert (values["alone_per_second"], values["served_per_second"]) == (100.0, 88.0)


def test_both_sides_take_the_threads_of_the_server() -> None:
    assert threads_of({"threads": {"value": "1"}, "lone_threads": {"value": "2"}}) == (1, 2)
    assert threads_of({"threads": {"value": "4"}}) == (4, 4)
