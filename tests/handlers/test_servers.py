"""The time in the queue, by the gateway's header."""

from __future__ import annotations

import pytest

from beeline.servers import queue_milliseconds


@pytest.mark.parametrize("start", [None, 3, "", "t=", "t=soon", "t=nan", "t=inf", "t=1000", "t=4601", "t=4600000"])
def test_no_queue_without_a_believable_start(start: object) -> None:
    assert queue_milliseconds(start, now=1000 + 3600) is None


@pytest.mark.parametrize("start", ["t=999.5", "999.5"])
def test_the_queue_is_the_time_since_the_gateway_took_the_request(start: str) -> None:
    assert queue_milliseconds(start, now=1000) == 500
