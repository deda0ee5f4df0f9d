"""Where a request's time went, as a header says it."""

from __future__ import annotations

import pytest

from beeline.timing import queue_milliseconds, server_timing


def test_a_server_timing_header() -> None:
    assert server_timing({"queue": 3.214, "decode": 2}) == "queue;dur=3.21, decode;dur=2.00"


@pytest.mark.parametrize("start", [None, 3, "", "t=", "t=soon", "t=nan", "t=inf", "t=1000", "t=4601", "t=4600000"])
def test_no_queue_without_a_believable_start(start: object) -> None:
    assert queue_milliseconds(start, now=1000 + 3600) is None


@pytest.mark.parametrize("start", ["t=999.5", "999.5"])
def test_the_queue_is_the_time_since_the_gateway_took_the_request(start: str) -> None:
    assert queue_milliseconds(start, now=1000) == 500
