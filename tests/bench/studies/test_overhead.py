"""What the gateway and a container cost: how the turns of two addresses become figures."""

from __future__ import annotations

import pytest

from bench.studies.overhead import summary


def test_ratios_are_of_pairs_and_not_of_medians(capsys: pytest.CaptureFixture[str]) -> None:
    # The third pair had a slow moment of the machine, which both sides have.
    server = [{"per_second": rate, "gateway_cpu_ms": 0.0} for rate in (100.0, 110.0, 50.0)]
    gateway = [{"per_second": rate, "gateway_cpu_ms": 0.2} for rate in (90.0, 110.0, 40.0)]
    values = summary({"server": server, "gateway": gateway})
    assert (values["ratio"], values["ratios"]) == (0.9, [0.8, 0.9, 1.0])
    assert (values["server_per_second"], values["gateway_per_second"]) == (100.0, 90.0)
    assert (values["server_gateway_cpu_ms"], values["gateway_gateway_cpu_ms"]) == (0.0, 0.2)
    # Three pairs say nothing with 95 % confidence.
    assert values["interval"] is None
    assert "ratio" in capsys.readouterr().out
