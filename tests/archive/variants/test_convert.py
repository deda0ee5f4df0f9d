"""Conversion: what cannot be converted is refused, and int8 is controlled by pictures that did not calibrate it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import pytest
from numpy.typing import NDArray

from archive.variants import CONVERTERS, agreement
from archive.variants.agreement import Gate, Pictures
from archive.variants.convert import quantised
from beeline.classification import probabilities
from beeline.errors import ArchiveError
from beeline.spec import Geometry, ModelSpec
from tests.archive.variants.test_agreement import SMALL

Hand = Callable[[Gate], dict[str, Any]]
GATE = Gate(0.97, 0.1)


@pytest.mark.parametrize("engine", ["onnxruntime", "torch_compile"])
def test_torchscript_is_refused_with_the_fix(tiny_export: Path, tmp_path: Path, engine: str) -> None:
    spec = ModelSpec.load(tiny_export)
    scripted = dataclasses.replace(spec, model=dataclasses.replace(spec.model, format="torchscript"))
    none = np.empty(0, np.uint8)
    pictures = Pictures(none, none, none, SMALL, "none")
    with pytest.raises(ArchiveError, match=r"is torchscript, which .* cannot .*; take --engine torch"):
        CONVERTERS[engine].convert(tiny_export, scripted, tmp_path, "fp32", pictures, GATE)


def answered(model: tuple[str, int], one: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return a picture's values as its scores: moved to other labels by `roll`, or made less sure by `lower`.

    With a number, as in `roll 10`, only for one label in so many.
    """
    kind, by = model
    scores = one.reshape(1, -1).astype(np.float32)
    kind, _, each = kind.partition(" ")
    if each and scores.argmax() % int(each) != 1:
        return scores
    return np.roll(scores, by, axis=1) if kind == "roll" else np.maximum(scores - by, 0)


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Hand:
    """What NNCF gets for a model whose label is the brightest place of a picture; a stand-in, to see its datasets."""
    crops = np.zeros((60, 8, 8, 3), np.uint8)
    crops.reshape(60, -1)[np.arange(60), np.arange(60)] = 8
    pictures = Pictures(crops, crops[:0], crops[:0], Geometry(8, 8), "drawn")
    seen: dict[str, Any] = {}
    monkeypatch.setattr(nncf, "quantize_with_accuracy_control", lambda model, **options: seen.update(options))

    def given(gate: Gate) -> dict[str, Any]:
        quantised(("roll", 0), pictures, gate, "logits", lambda model: model, answered)
        return seen

    return given


def test_no_picture_both_calibrates_and_controls(hand: Hand) -> None:
    calibration = {one.tobytes() for one in hand(GATE)["calibration_dataset"].get_inference_data()}
    control = {one.tobytes() for one, _ in hand(GATE)["validation_dataset"].get_data()}
    assert (len(calibration), len(control)) == (30, 30)
    assert not calibration & control


def test_each_picture_keeps_its_own_label_and_a_smaller_move_has_a_better_mark(hand: Hand) -> None:
    validate, dataset = hand(GATE)["validation_fn"], hand(GATE)["validation_dataset"]
    for part in ([7, 3, 29], range(30)):
        assert validate(("roll", 0), dataset.get_data(part))[1] == [1.0] * len(part)
        assert [round(mark) for mark in validate(("roll", 1), dataset.get_data(part))[1]] == [0] * len(part)
    little, more, much = (validate(("lower", by), dataset.get_data([4]))[1][0] for by in (0, 1, 5))
    assert little > more > 0.99
    assert much < 0.01


@pytest.mark.parametrize("gate", [Gate(0.8, 0.1), Gate(0.8, 1.0), Gate(0.99, 1.0), Gate(1.0, 0.0)], ids=str)
@pytest.mark.parametrize(
    "model",
    [("roll", 1), ("roll 10", 1), ("roll 60", 1), ("lower", 1), ("lower 10", 5), ("lower 60", 5), ("lower", 8)],
    ids=str,
)
def test_nncf_accepts_what_the_gate_accepts_on_the_same_pictures(
    hand: Hand, gate: Gate, model: tuple[str, int]
) -> None:
    options = hand(gate)
    data = list(options["validation_dataset"].get_data())
    validate = options["validation_fn"]
    drop = validate(("roll", 0), data)[0] - validate(model, data)[0]
    expected = np.stack([expected for _, expected in data])
    actual = probabilities(np.concatenate([answered(model, one) for one, _ in data]), "logits")
    try:
        agreement.check(agreement.measure(expected, actual, "drawn"), gate, "it")
        passes = True
    except ArchiveError:
        passes = False
    assert (drop <= options["max_drop"]) == passes
