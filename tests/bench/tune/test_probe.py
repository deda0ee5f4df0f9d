"""What the tuner's process counts as a worker's: the second model of OpenVINO, for pictures that come alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.tune.probe import _second


@pytest.mark.parametrize(("threads", "lone"), [(1, 2), (2, 3)])
def test_a_worker_on_openvino_loads_a_second_model(openvino_model: Path, threads: int, lone: int) -> None:
    second = _second(openvino_model, threads, lone)
    assert second is not None
    loaded, seconds = second
    assert loaded.choice["threads"].value == str(lone)
    assert seconds > 0


def test_no_second_model_where_it_would_be_the_same_or_on_pytorch(openvino_model: Path, colour_model: Path) -> None:
    assert _second(openvino_model, 2, 2) is None
    assert _second(colour_model, 1, 2) is None
