"""What serving costs: how turns become figures."""

from __future__ import annotations

from typing import Any

from bench.studies.serving import medians


def turn(
    alone: float, served: float, gateway: float, p95_ms: float, failed: int, lone: list[tuple[float, float]]
) -> dict[str, Any]:
    rates = {"alone_per_second": alone, "served_per_second": served, "gateway_per_second": gateway}
    return {**rates, "served_p95_ms": p95_ms, "cpu_ms": {"java": gateway / 100}, "failed": failed, "lone": lone}


def test_ratios_are_of_the_turns_and_not_of_the_medians() -> None:
    turns = [
        turn(100.0, 90.0, 81.0, 400.0, 0, [(32.0, 30.0), (33.0, 30.0)]),
        # A slow moment of the machine, which both sides of the turn had.
        turn(50.0, 40.0, 36.0, 900.0, 1, [(61.0, 60.0)]),
        turn(110.0, 88.0, 44.0, 410.0, 0, [(33.0, 29.0), (34.0, 28.0)]),
    ]
    values = medians(turns)
    assert (values["kept"], values["gateway_kept"]) == (0.8, 0.9)
    assert (values["served_ms"], values["alone_ms"], values["added_ms"]) == (33.0, 30.0, 3.0)
    assert values["failed"] == 1
    assert (values["alone_per_second"], values["served_per_second"]) == (100.0, 88.0)
    assert (values["gateway_per_second"], values["cpu_ms"]) == (44.0, {"java": 0.44})
