"""The load on real servers with the project's handler: batch sizes and timings come through the gateway."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.load import Plan, run
from bench.load.measure import resolve
from bench.pictures import Pictures
from serve.addresses import Ports
from serve.config import Overrides
from serve.up import Request, up
from tests.conftest import BLUE, RED


@pytest.mark.bench
@pytest.mark.parametrize("server", ["torchserve", "mms"])
def test_batches_and_stages_are_seen_through_the_gateway(server: str, colour_archive: Path, tmp_path: Path) -> None:
    asked = Request(
        server=server,
        wanted=(str(colour_archive),),
        store=colour_archive.parent,
        name="bench-load",
        overrides=Overrides(batch_size=4, workers=1, max_batch_delay=20),
        ports=Ports(0),
        gateway="nginx",
    )
    pictures = Pictures("colours", ("red.png", "blue.png", "none.png"), (RED, BLUE, b"no picture"))
    with up(asked, lambda line: None, {**os.environ, "BEELINE_STATE": str(tmp_path)}) as running:
        plan = Plan(resolve(running.state.inference), pictures, seconds=2.0, warm_up=0.5, clients=8)
        found = run(plan).summary()
    assert plan.url.endswith("/predictions/colours")
    # Every third picture is none, and its neighbours get their answers.
    assert set(found["statuses"]) == {"200", "415"}
    assert found["statuses"]["200"] > found["statuses"]["415"]
    assert found["errors"] == {}
    assert sum(found["batch_sizes"].values()) == found["requests"]
    assert "4" in found["batch_sizes"]
    assert all(value is not None for value in found["timing_ms"].values())
