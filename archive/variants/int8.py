"""A graph in int8 by NNCF, with the layers that cost too much agreement put back into fp32."""

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
from beeline.errors import ConfigError

# So many calibrate, and so many others control; more change the ranges no longer.
_CALIBRATION, _CONTROL = 200, 200
# So little of a picture's mark is how far its probabilities move: it ranks layers between which no picture decides.
_NEAR = 1e-3
# A runnable graph, and one picture, uint8 `[1, crop, crop, 3]`, to its scores.
Scores = Callable[[Any, NDArray[np.uint8]], NDArray[np.float32]]


def without_telemetry() -> None:
    """Keep OpenVINO and NNCF from reporting their use: both do through this package where they can import it."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def quantised(
    model: Any,
    pictures: Pictures,
    gate: Gate,
    output: str,
    runnable: Callable[[Any], Any],
    scores: Scores,
    feed: Callable[[NDArray[np.uint8]], Any] = lambda one: one,
) -> Any:
    """Return the graph in int8, less the layers that the gate does not let through on pictures that calibrated nothing.

    Args:
        model: a graph that NNCF knows, in fp32.
        pictures: of those to calibrate with every second one calibrates and the others control, since a graph flatters
            the pictures that its ranges were taken from; those to judge by are not looked at.
        gate: what the pictures that control are to keep; the gate itself asks the same of other pictures.
        output: what the model returns, as its spec says.
        runnable: makes a graph runnable.
        scores: runs what `runnable` made, or what NNCF made of the graph in its place.
        feed: turns a picture into what NNCF gives the graph.

    Raises:
        ConfigError: where NNCF is not installed.
    """
    without_telemetry()
    # PyTorch's part for extensions, which NNCF loads, warns where a compiler for CUDA is and no CUDA device.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import nncf
    except ModuleNotFoundError as error:
        raise ConfigError("NNCF, which int8 needs, is not installed here; install the package nncf") from error
    ones = [crop[None] for crop in pictures.calibration[0::2][:_CALIBRATION]]
    reference = runnable(model)
    # Each with its probabilities, since NNCF has some of them judged apart, those that most is lost on, to rank layers.
    control = [
        (crop[None], probabilities(scores(reference, crop[None]), output)[0])
        for crop in pictures.calibration[1::2][:_CONTROL]
    ]

    def kept(made: Any, data: Any) -> tuple[float, list[float]]:
        """Return the gate's slack over these pictures and one, since NNCF divides by it, and the mark of each."""
        ready = runnable(made)
        pairs = [(probabilities(scores(ready, one), output)[0], expected) for one, expected in data]
        moved = np.array([np.abs(found - expected).max() for found, expected in pairs])
        same = np.array([found.argmax() == expected.argmax() for found, expected in pairs])
        marks = (same & (moved <= gate.moved)) - _NEAR * moved
        return 1 + gate.slack(same, moved) - _NEAR * float(moved.mean()), marks.tolist()

    # Of a model that moves nothing, as the graph in fp32 is: NNCF looks at the difference from what that one gets.
    whole = gate.slack(np.ones(len(control), bool), np.zeros(len(control)))

    logging.getLogger("nncf").setLevel(logging.WARNING)
    # Its progress bars are in nobody's terms, and its warnings about libraries that it uses.
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
