"""What serving costs: how turns become figures."""

from __future__ import annotations

from typing import Any

import pytest

from bench.studies.serving import medians, ratios_of


def test_two_addresses_have_ratios_of_pairs_and_not_of_medians(capsys: pytest.CaptureFixture[str]) -> None:
    # The third pair had a slow moment of the machine, which both sides have.
    server = [{"per_second": rate, "gateway_cpu_ms": 0.0} for rate in (100.0, 110.0, 50.0)]
    gateway = [{"per_second": rate, "gateway_cpu_ms": 0.2} for rate in (90.0, 110.0, 40.0)]
    values = ratios_of({"server": server, "gateway": gateway})
    assert (values["ratio"], values["ratios"]) == (0.9, [0.8, 0.9, 1.0])
    assert values["per_second"] == {"server": 100.0, "gateway": 90.0}
    assert values["gateway_cpu_ms"] == {"server": 0.0, "gateway": 0.2}
    # Three pairs say nothing with 95 % confidence.
    assert values["interval"] is None
    assert "ratio" in capsys.readouterr().out


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
    values = medians(turns)
    assert values["kept"] == 0.8
    assert (values["served_ms"], values["alone_ms"], values["added_ms"]) == (33.0, 30.0, 3.0)
    assert values["failed"] == 1
    assert (values["alone_per_second"], values["served_per_second"]) == (100.0, 88.0)
