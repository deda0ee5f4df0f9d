"""The task of naming what is in a picture: logits to the best labels with their probabilities."""
# ruff: noqa: D102 - `Task` documents these methods

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beeline.answer import JSON, Answer, dump, failure
from beeline.batch import Batch
from beeline.errors import ModelError, SelfTestError, SpecError, did_you_mean
from beeline.spec import GOLDEN, OUTPUTS, TEMPERATURES, ModelSpec, check
from beeline.tasks import Task

DETAILED = "application/vnd.beeline+json"
_PLACES = 6


class Classification(Task):
    """Answers `{"bees": 0.98, "ants": 0.02}`."""

    def check(self) -> None:
        """Check labels, `output`, `top_k`, and what the answers' probabilities depend on."""
        spec = self.spec
        check(spec.caption is None, "caption", spec.caption, "none where task is 'classify'")
        check(len(spec.labels) >= 2, "labels", list(spec.labels), "a classifier needs at least two")
        for label, count in Counter(spec.labels).items():
            check(bool(label.strip()), "labels", label, "no label may be blank")
            check(count == 1, "labels", label, "it occurs twice; tell them apart, as by their class ids")
        if spec.output not in OUTPUTS:
            raise SpecError(f"output is {spec.output!r}{did_you_mean(spec.output, OUTPUTS)}")
        check(spec.top_k >= 1, "top_k", spec.top_k, "at least 1")
        if spec.temperature is not None:
            low, high = TEMPERATURES
            check(low <= spec.temperature <= high, "temperature", spec.temperature, f"{low} to {high}")
            check(spec.output == "logits", "temperature", spec.temperature, f"none, since the output is {spec.output}")
        if spec.not_sure_under is not None:
            check(0 <= spec.not_sure_under <= 1, "not_sure_under", spec.not_sure_under, "0 to 1")

    def run(self, batch: Batch) -> Any:
        if not batch.good:
            return np.empty((0, len(self.spec.labels)), np.float32)
        return self.forward(batch.stack())

    def answers(self, results: NDArray[np.float32], batch: Batch) -> list[Answer]:
        spec = self.spec
        rows = probabilities(results, spec.output, spec.temperature) if batch.good else np.empty((0, 0))
        return [prediction(row, spec, batch.accept(i)) for row, i in zip(rows, batch.good, strict=True)]

    def top(self, body: dict[str, Any]) -> list[tuple[str, float]]:
        return [(str(label), float(score)) for label, score in body.items()]

    def compare(self, expected: Sequence[Mapping[str, Any]], results: NDArray[np.float32]) -> None:
        """Compare top-1, and each probability within `spec.tolerance`."""
        spec = self.spec
        for entry, row in zip(expected, probabilities(results, spec.output), strict=True):
            name, top = f"{GOLDEN}/{entry['file']}", [(str(label), float(value)) for label, value in entry["top"]]
            got = dict(top_labels(row, spec, len(spec.labels)))
            best = next(iter(got))
            first, value = top[0]
            if not np.isfinite(row).all():
                raise SelfTestError(f"{name} gives a number that is not finite; export the model again")
            if best != first:
                raise SelfTestError(
                    f"{name} is answered {best!r} ({got[best]:.3f}), expected {first!r} ({value:.3f}); model, "
                    "labels or preprocessing are not those of the export: build the archive again"
                )
            for label, value in top:
                if abs(got.get(label, -1.0) - value) > spec.tolerance:
                    raise SelfTestError(
                        f"{name} gives {label!r} {got.get(label, float('nan')):.3f}, expected {value:.3f} "
                        f"within {spec.tolerance}; preprocessing or precision is not that of the export: build again"
                    )


def probabilities(scores: NDArray[np.float32], output: str, temperature: float | None = None) -> NDArray[np.float64]:
    """Turn the model's `[N, classes]` output into probabilities; `output` and `temperature` are the spec's.

    Logits are divided by the temperature (None: 1) and need a softmax.

    Scores stay as they are: each is the probability of its own label.
    """
    values = scores.astype(np.float64)
    if output != "logits":
        return values
    values = np.exp((values - values.max(axis=1, keepdims=True)) / (temperature or 1))
    return np.asarray(values / values.sum(axis=1, keepdims=True))


def top_labels(row: NDArray[np.float64], spec: ModelSpec, top_k: int | None = None) -> list[tuple[str, float]]:
    """Return the best labels of one row of probabilities with their values, best first, ties by index."""
    count = min(top_k or spec.top_k, len(spec.labels))
    order = np.argsort(-row, kind="stable")[:count]
    return [(spec.labels[i], round(float(row[i]), _PLACES)) for i in order]


def prediction(row: NDArray[np.float64], spec: ModelSpec, accept: str | None = None) -> Answer:
    """Answer one picture: `{"bees": 0.98, "ants": 0.02}`, or in full where the client asks for `DETAILED`.

    A probability that is not finite makes it a failure.
    """
    if not np.isfinite(row).all():
        error = ModelError("the model's output for this picture is not a finite number; export and verify it again")
        return failure(error)
    best = top_labels(row, spec)
    if accept is None or DETAILED not in accept:
        return Answer(200, "OK", dump(dict(best)), {"content-type": JSON})
    body: dict[str, Any] = {
        "predictions": [{"label": label, "score": score} for label, score in best],
        "model": {"name": spec.name, "version": spec.version, "fingerprint": spec.fingerprint()},
    }
    if spec.provenance.generated:
        body["warning"] = f"this model was trained on generated pictures ({spec.provenance.data}), not on photographs"
    return Answer(200, "OK", dump(body), {"content-type": DETAILED})
