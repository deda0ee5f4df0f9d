"""One request's answer: what a model says about a picture, as JSON, or a 4xx that says what was wrong.

An answer is safe for both servers: the body is text, every number finite, the reason phrase constant, the headers
printable ASCII. (A `numpy.float32`, a NaN or a line break in a phrase each break one of the servers.)
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from beeline.errors import ModelError, RequestError

JSON = "application/json"


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


def failure(error: RequestError) -> Answer:
    """Answer one request that failed, in the shape of the servers' own errors."""
    body = {"code": error.status, "type": type(error).__name__, "message": str(error)}
    return Answer(error.status, error.phrase, dump(body), {"content-type": JSON}, error.reason)


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


def dump(value: dict[str, Any]) -> str:
    """Return JSON text; raise `ValueError` for a number that is not finite."""
    return json.dumps(value, allow_nan=False)
