"""int8: what controls the accuracy took no part in calibration, and each picture keeps its own label."""

from __future__ import annotations

from typing import Any

import nncf
import numpy as np
import pytest
from numpy.typing import NDArray

from archive.agreement import Gate, Pictures
from archive.int8 import quantised
from beeline.spec import Geometry


def answered(model: tuple[str, int], one: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return a picture's values as its scores, moved to other labels by `roll`, made less sure by `lower`."""
    kind, by = model
    scores = one.reshape(1, -1).astype(np.float32)
    return np.roll(scores, by, axis=1) if kind == "roll" else np.maximum(scores - by, 0)


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What NNCF is given for a model whose label is a picture's brightest place; a stand-in, to see its datasets."""
    crops = np.zeros((60, 8, 8, 3), np.uint8)
    crops.reshape(60, -1)[np.arange(60), np.arange(60)] = 8
    pictures = Pictures(crops, crops[:0], crops[:0], Geometry(8, 8), "drawn")
    seen: dict[str, Any] = {}

    def look(model: Any, **options: Any) -> Any:
        seen.update(options)
        return model

    monkeypatch.setattr(nncf, "quantize_with_accuracy_control", look)
    quantised(("roll", 0), pictures, Gate(0.97, 0.1), "logits", lambda model: model, answered)
    return seen


def test_no_picture_both_calibrates_and_controls(handed: dict[str, Any]) -> None:
    calibration = {one.tobytes() for one in handed["calibration_dataset"].get_inference_data()}
    control = {one.tobytes() for one, _ in handed["validation_dataset"].get_data()}
    assert (len(calibration), len(control)) == (30, 30)
    assert not calibration & control
    assert handed["max_drop"] == pytest.approx(0.031)


def test_a_part_of_the_pictures_is_judged_by_its_own_labels(handed: dict[str, Any]) -> None:
    kept, dataset = handed["validation_fn"], handed["validation_dataset"]
    for part in ([7, 3, 29], range(30)):
        assert kept(("roll", 0), dataset.get_data(part)) == (1.0, [1.0] * len(part))
        mean, marks = kept(("roll", 1), dataset.get_data(part))
        assert (round(mean), [round(mark) for mark in marks]) == (0, [0] * len(part))


def test_a_probability_that_moves_too_far_is_a_loss_too_and_less_is_told_apart(handed: dict[str, Any]) -> None:
    kept, dataset = handed["validation_fn"], handed["validation_dataset"]
    little, more, much = (kept(("lower", by), dataset.get_data([4]))[0] for by in (0, 1, 5))
    assert little > more > 0.99
    assert much < 0.01
