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

from archive.agreement import Pictures
from beeline.errors import ConfigError

# So many calibrate and control; more change the ranges no longer.
_CALIBRATION, _CONTROL = 200, 200
# A runnable graph, and one picture, uint8 `[1, crop, crop, 3]`, to its scores.
Scores = Callable[[Any, NDArray[np.uint8]], NDArray[np.float32]]


def without_telemetry() -> None:
    """Keep OpenVINO and NNCF from reporting their use: both do through this package where they can import it."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def quantised(
    model: Any,
    pictures: Pictures,
    top1: float,
    runnable: Callable[[Any], Any],
    scores: Scores,
    feed: Callable[[NDArray[np.uint8]], Any] = lambda one: one,
) -> Any:
    """Return the graph in int8 so that the part `top1` of first labels stays, on the pictures that calibrate.

    Args:
        model: a graph that NNCF knows, in fp32.
        pictures: those to calibrate with are used; those to judge by are not looked at.
        top1: the part of equal first labels to keep.
        runnable: makes a graph runnable.
        scores: runs what `runnable` made, or what NNCF made of the graph in its place.
        feed: turns a picture into what NNCF gives the graph.

    Raises:
        ConfigError: where NNCF is not installed.
    """
    without_telemetry()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import nncf
    except ModuleNotFoundError as error:
        raise ConfigError("NNCF, which int8 needs, is not installed here; install the package nncf") from error
    ones = [crop[None] for crop in pictures.calibration[:_CALIBRATION]]
    control = [crop[None] for crop in pictures.calibration[:_CONTROL]]
    first = runnable(model)
    labels = [int(scores(first, one)[0].argmax()) for one in control]

    def agreement(made: Any, data: Any) -> tuple[float, list[float]]:
        ready = runnable(made)
        same = [float(int(scores(ready, one)[0].argmax()) == label) for one, label in zip(data, labels, strict=False)]
        return sum(same) / len(same), same

    logging.getLogger("nncf").setLevel(logging.WARNING)
    # Its progress bars are in nobody's terms, and its warnings about libraries that it uses.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nncf.quantize_with_accuracy_control(
            model,
            calibration_dataset=nncf.Dataset(ones, feed),
            validation_dataset=nncf.Dataset(control),
            validation_fn=agreement,
            max_drop=1 - top1,
            subset_size=len(ones),
        )
