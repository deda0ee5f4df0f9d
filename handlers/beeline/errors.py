"""The errors: each is one sentence that names what, its value and the fix.

Two trees. `BeelineError` is for the person at the terminal and carries a process exit code;
`RequestError` is for one client of a running worker and carries an HTTP status.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class BeelineError(Exception):
    """The thing asked for does not hold; the message is one sentence with what, value and fix."""

    exit_code: ClassVar[int] = 1


class Undetermined(BeelineError):
    """The question could not be answered (a missing tool, a lost server)."""

    exit_code: ClassVar[int] = 2


class SpecError(BeelineError):
    """A `model_spec.json` that breaks its schema."""


class ConfigError(BeelineError):
    """A configuration file or environment variable with an unknown key or an impossible value."""


class ArchiveError(BeelineError):
    """An archive, or what should become one, that is damaged, unsafe or incomplete."""


class SelfTestError(ArchiveError):
    """A model that does not answer its golden pictures as it did when it was exported."""


class RequestError(Exception):
    """One request that gets its own 4xx while its neighbours in the batch get their answers.

    `status` is the HTTP status; `phrase` its reason phrase (constant text, safe on the status line);
    `reason` the short name under which it is counted.
    """

    status: ClassVar[int] = 400
    phrase: ClassVar[str] = "Bad Request"
    reason: ClassVar[str] = "bad_request"


class EmptyBody(RequestError):
    """A request without a single byte of picture."""

    reason = "empty_body"


class BadEncoding(RequestError):
    """JSON or base64 that cannot be read as one picture."""

    reason = "bad_encoding"


class TooManyBytes(RequestError):
    """A picture of more bytes than the limit."""

    status = 413
    phrase = "Content Too Large"
    reason = "too_many_bytes"


class TooManyPixels(RequestError):
    """A picture whose header declares more pixels than the limit; judged before it is decoded."""

    status = 413
    phrase = "Content Too Large"
    reason = "too_many_pixels"


class TooMuchWork(RequestError):
    """A picture whose structure would cost far more time or memory than its size and pixels say."""

    status = 413
    phrase = "Content Too Large"
    reason = "too_much_work"


class NotAnImage(RequestError):
    """Bytes of no supported picture format."""

    status = 415
    phrase = "Unsupported Media Type"
    reason = "not_an_image"


class TruncatedImage(RequestError):
    """A picture that begins well and then breaks off or is corrupt."""

    status = 422
    phrase = "Unprocessable Content"
    reason = "truncated_image"


class ModelError(RequestError):
    """The forward pass itself failed: the server's fault, not the client's."""

    status = 500
    phrase = "Internal Server Error"
    reason = "model_error"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest known word, or the list of known ones."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
