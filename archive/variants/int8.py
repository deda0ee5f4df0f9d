"""A graph in int8 by NNCF; layers that cost too much agreement go back to fp32."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archive.variants.agreement import Gate, Pictures
from beeline.answer import probabilities

# OpenVINO and NNCF report their use through this package where they can import it.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

# How many pictures calibrate and how many others control; more do not change the ranges any further.
_CALIBRATION, _CONTROL = 200, 200
# How far a picture's probabilities move is this small a part of its mark: it ranks layers that no picture tells apart.
_NEAR = 1e-3
# A runnable graph, and one picture, uint8 `[1, crop, crop, 3]`, to its scores.
Scores = Callable[[Any, NDArray[np.uint8]], NDArray[np.float32]]


def quantised(
    model: Any,
    pictures: Pictures,
    gate: Gate,
    output: str,
    runnable: Callable[[Any], Any],
    scores: Scores,
    feed: Callable[[NDArray[np.uint8]], Any] = lambda one: one,
) -> Any:
    """Return the graph in int8; layers stay in fp32 where the gate needs that on pictures that did not calibrate.

    Args:
        model: a graph that NNCF knows, in fp32.
        pictures: every second one of those to calibrate with calibrates and the others control, since a graph flatters
            the pictures that its ranges were taken from; those to judge by are not used.
        gate: what the controlling pictures must keep; the gate itself asks the same of other pictures.
        output: what the model returns, as its spec says.
        runnable: makes a graph runnable.
        scores: runs what `runnable` made, or what NNCF made of the graph.
        feed: turns a picture into what NNCF gives the graph.
    """
    # PyTorch's part for extensions, which NNCF loads, warns where CUDA's compiler is installed without a CUDA device.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import nncf
    ones = [crop[None] for crop in pictures.calibration[0::2][:_CALIBRATION]]
    reference = runnable(model)
    # Each with its probabilities, since NNCF judges some of them apart: those that lose most, to rank layers.
    control = [
        (crop[None], probabilities(scores(reference, crop[None]), output)[0])
        for crop in pictures.calibration[1::2][:_CONTROL]
    ]

    def kept(made: Any, data: Any) -> tuple[float, list[float]]:
        """Return one plus the gate's slack over these pictures, since NNCF divides by it, and the mark of each."""
        ready = runnable(made)
        pairs = [(probabilities(scores(ready, one), output)[0], expected) for one, expected in data]
        moved = np.array([np.abs(found - expected).max() for found, expected in pairs])
        same = np.array([found.argmax() == expected.argmax() for found, expected in pairs])
        marks = (same & (moved <= gate.moved)) - _NEAR * moved
        return 1 + gate.slack(same, moved) - _NEAR * float(moved.mean()), marks.tolist()

    # The slack of the graph in fp32, which moves nothing: NNCF looks at the difference from that.
    whole = gate.slack(np.ones(len(control), bool), np.zeros(len(control)))

    logging.getLogger("nncf").setLevel(logging.WARNING)
    # NNCF's progress bars and its warnings about its libraries tell users nothing.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nncf.quantize_with_accuracy_control(
            model,
            calibration_dataset=nncf.Dataset(ones, feed),
            validation_dataset=nncf.Dataset(control, lambda each: feed(each[0])),
            validation_fn=kept,
            max_drop=whole + _NEAR,
            subset_size=len(ones),
        )
