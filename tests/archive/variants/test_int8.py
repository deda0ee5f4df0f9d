"""int8: what controls the accuracy took no part in calibration, and each picture keeps its own label."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nncf
import numpy as np
import pytest
from numpy.typing import NDArray

from archive.variants import agreement
from archive.variants.agreement import Gate, Pictures
from archive.variants.int8 import quantised
from beeline.answer import probabilities
from beeline.errors import ArchiveError
from beeline.spec import Geometry


def answered(model: tuple[str, int], one: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return a picture's values as its scores, moved to other labels by `roll`, made less sure by `lower`.

    With a number behind it, of every so manieth label alone.
    """
    kind, by = model
    scores = one.reshape(1, -1).astype(np.float32)
    kind, _, each = kind.partition(" ")
    if each and scores.argmax() % int(each) != 1:
        return scores
    return np.roll(scores, by, axis=1) if kind == "roll" else np.maximum(scores - by, 0)


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Callable[[Gate], dict[str, Any]]:
    """What NNCF is given for a model whose label is a picture's brightest place; a stand-in, to see its datasets."""
    crops = np.zeros((60, 8, 8, 3), np.uint8)
    crops.reshape(60, -1)[np.arange(60), np.arange(60)] = 8
    pictures = Pictures(crops, crops[:0], crops[:0], Geometry(8, 8), "drawn")
    seen: dict[str, Any] = {}

    def look(model: Any, **options: Any) -> Any:
        seen.update(options)
        return model

    monkeypatch.setattr(nncf, "quantize_with_accuracy_control", look)

    def given(gate: Gate) -> dict[str, Any]:
        quantised(("roll", 0), pictures, gate, "logits", lambda model: model, answered)
        return seen

    return given


@pytest.fixture
def handed(hand: Callable[[Gate], dict[str, Any]]) -> dict[str, Any]:
    """The same for one gate."""
    return hand(Gate(0.97, 0.1))


def test_no_picture_both_calibrates_and_controls(handed: dict[str, Any]) -> None:
    calibration = {one.tobytes() for one in handed["calibration_dataset"].get_inference_data()}
    control = {one.tobytes() for one, _ in handed["validation_dataset"].get_data()}
    assert (len(calibration), len(control)) == (30, 30)
    assert not calibration & control


def test_a_part_of_the_pictures_is_judged_by_its_own_labels(handed: dict[str, Any]) -> None:
    kept, dataset = handed["validation_fn"], handed["validation_dataset"]
    for part in ([7, 3, 29], range(30)):
        assert kept(("roll", 0), dataset.get_data(part))[1] == [1.0] * len(part)
        assert [round(mark) for mark in kept(("roll", 1), dataset.get_data(part))[1]] == [0] * len(part)


def test_less_of_a_move_is_told_apart(handed: dict[str, Any]) -> None:
    kept, dataset = handed["validation_fn"], handed["validation_dataset"]
    little, more, much = (kept(("lower", by), dataset.get_data([4]))[1][0] for by in (0, 1, 5))
    assert little > more > 0.99
    assert much < 0.01


@pytest.mark.parametrize("gate", [Gate(0.8, 0.1), Gate(0.8, 1.0), Gate(0.99, 1.0), Gate(1.0, 0.0)], ids=str)
@pytest.mark.parametrize(
    "model",
    [("roll", 1), ("roll 10", 1), ("roll 60", 1), ("lower", 1), ("lower 10", 5), ("lower 60", 5), ("lower", 8)],
    ids=str,
)
def test_nncf_lets_through_what_the_gate_would_let_through_on_the_same_pictures(
    hand: Callable[[Gate], dict[str, Any]], gate: Gate, model: tuple[str, int]
) -> None:
    handed = hand(gate)
    data = list(handed["validation_dataset"].get_data())
    kept = handed["validation_fn"]
    drop = kept(("roll", 0), data)[0] - kept(model, data)[0]
    expected = np.stack([expected for _, expected in data])
    found = probabilities(np.concatenate([answered(model, one) for one, _ in data]), "logits")
    try:
        agreement.check(agreement.measure(expected, found, "drawn"), gate, "it")
        passes = True
    except ArchiveError:
        passes = False
    assert (drop <= handed["max_drop"]) == passes
