"""Thresholds: what is understood, what is judged, and what is said of the rest."""

from __future__ import annotations

from typing import Any

import pytest

from beeline.errors import ConfigError
from bench.load.threshold import parse

SUMMARY: dict[str, Any] = {
    "p50_ms": 100.0,
    "p95_ms": 500.0,
    "p99_ms": 1000.0,
    "max_ms": None,
    "per_second": 300.0,
    "good_per_second": 290.0,
    "failed": 5,
    "requests": 500,
    "backlog": None,
}


@pytest.mark.parametrize(
    ("text", "value", "holds"),
    [
        ("p95>500ms", 500, True),
        ("p95>=500ms", 500, False),
        ("p95 > 499.9 ms", 500, False),
        ("p99>=1s", 1, False),
        ("p99>1s", 1, True),
        ("p50>.2s", 0.1, True),
        ("rps<300", 300, True),
        ("rps<=300/s", 300, False),
        ("good<300", 290, False),
        ("errors>0", 5, False),
        ("errors>5", 5, True),
        ("errors>0.9%", 1, False),
        ("errors>1%", 1, True),
        # What was not measured does not hold: no good answer has no slowest one.
        ("max>10s", None, False),
        ("backlog>0", None, False),
    ],
)
def test_each_is_judged_in_its_own_unit(text: str, value: float | None, holds: bool) -> None:
    verdict = parse(text).judge(SUMMARY)
    assert (verdict.text, verdict.value, verdict.holds) == (text, value, holds)


def test_a_backlog_is_that_at_the_end() -> None:
    found = SUMMARY | {"backlog": {"at_end": 40, "growing": True, "per_second": 4.0}}
    assert parse("backlog>40").judge(found).holds
    assert not parse("backlog>39").judge(found).holds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("p59>500ms", "quantity 'p59'; did you mean 'p99'"),
        ("error>0", "did you mean 'errors'"),
        ("latency>5ms", "known are backlog, errors, good, max, p50, p95, p99, rps"),
        ("p95>500", "write 'p95>500ms' or 'p95>500s'"),
        ("rps<300ms", "write 'rps<300' or 'rps<300/s'"),
        ("p95=500ms", "give a quantity"),
        ("p95>fast", "give a quantity"),
        ("", "give a quantity"),
    ],
)
def test_what_is_not_understood_is_said(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert message in str(caught.value)
