"""Logits to one request's answer: top-k JSON by the spec's labels, or a 4xx that says what was wrong.

An answer is safe for both servers: the body is text, every number finite, the reason phrase constant, the headers
printable ASCII. (A `numpy.float32`, a NaN or a line break in a phrase each break one of the servers.)
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beeline.errors import ModelError, RequestError
from beeline.spec import ModelSpec

JSON = "application/json"
DETAILED = "application/vnd.beeline+json"
_PLACES = 6


@dataclass(frozen=True)
class Answer:
    """What one client gets: status, reason phrase, body (JSON text), headers.

    `reason` is the short name of the error under which it is counted, None for a prediction.
    """

    status: int
    phrase: str
    body: str
    headers: dict[str, str] = field(default_factory=dict)
    reason: str | None = None

    def json(self) -> Any:
        """Return the parsed body."""
        return json.loads(self.body)


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
        return Answer(200, "OK", _dump(dict(best)), {"content-type": JSON})
    body: dict[str, Any] = {
        "predictions": [{"label": label, "score": score} for label, score in best],
        "model": {"name": spec.name, "version": spec.version, "fingerprint": spec.fingerprint()},
    }
    if spec.provenance.generated:
        body["warning"] = f"this model was trained on generated pictures ({spec.provenance.data}), not on photographs"
    return Answer(200, "OK", _dump(body), {"content-type": DETAILED})


def failure(error: RequestError) -> Answer:
    """Answer one request that failed, in the shape of the servers' own errors."""
    body = {"code": error.status, "type": type(error).__name__, "message": str(error)}
    return Answer(error.status, error.phrase, _dump(body), {"content-type": JSON}, error.reason)


def check_answers(answers: object, count: int) -> list[Answer]:
    """Return an overridden stage's answers; raise `ModelError` unless there is a proper one for each request."""
    if not isinstance(answers, (list, tuple)) or len(answers) != count:
        size = len(answers) if isinstance(answers, (list, tuple)) else f"a {type(answers).__name__}"
        raise ModelError(f"the handler made {size} answers for {count} requests; return a list of one Answer each")
    for answer in answers:
        proper = isinstance(answer, Answer) and isinstance(answer.status, int) and isinstance(answer.headers, dict)
        if not proper or not 200 <= answer.status <= 599:
            what = f"the handler made {repr(answer)[:80]}"
            raise ModelError(f"{what}; return an Answer with a status of 200 to 599 and a dict of headers")
    return list(answers)


def _dump(value: dict[str, Any]) -> str:
    return json.dumps(value, allow_nan=False)
