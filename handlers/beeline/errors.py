"""The errors: the message of each is one sentence that names what is wrong, its value and the fix.

A `BeelineError` is for the person at the terminal and has the exit code of the process; a `RequestError` is for one
client of a running worker and has an HTTP status.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import ClassVar


class BeelineError(Exception):
    """What was asked for does not hold."""

    exit_code: ClassVar[int] = 1


class Undetermined(BeelineError):
    """The question has no answer: a tool is missing, or a server is gone."""

    exit_code: ClassVar[int] = 2


class SpecError(BeelineError):
    """A `model_spec.json` that breaks its schema."""


class ConfigError(BeelineError):
    """A configuration file or environment variable with an unknown key or an impossible value."""


class ArchiveError(BeelineError):
    """An archive, or the input of one, that is damaged, unsafe or incomplete."""


class SelfTestError(ArchiveError):
    """A model that no longer answers its golden pictures as it did at its export."""


class RequestError(Exception):
    """One request that fails; its neighbours in the batch still get their answers.

    `phrase` is the reason phrase of `status`, a constant that is safe on the status line. `reason` is the short name
    under which the error is counted.
    """

    status: ClassVar[int] = 400
    phrase: ClassVar[str] = "Bad Request"
    reason: ClassVar[str] = "bad_request"


class EmptyBody(RequestError):
    """A request without a single byte of picture."""

    reason = "empty_body"


class BadEncoding(RequestError):
    """JSON or base64 that cannot be read as one picture, or a prompt or a number that cannot be for it."""

    reason = "bad_encoding"


class TooManyBytes(RequestError):
    """A picture of more bytes than the limit."""

    status, phrase, reason = 413, "Content Too Large", "too_many_bytes"


class TooManyPixels(RequestError):
    """A picture whose header declares more pixels than the limit; it is not decoded."""

    status, phrase, reason = 413, "Content Too Large", "too_many_pixels"


class TooMuchWork(RequestError):
    """A picture that costs far more time or memory than its size and pixels suggest."""

    status, phrase, reason = 413, "Content Too Large", "too_much_work"


class NotAnImage(RequestError):
    """Bytes of no supported picture format."""

    status, phrase, reason = 415, "Unsupported Media Type", "not_an_image"


class TruncatedImage(RequestError):
    """A picture that starts well and then is cut off or corrupt."""

    status, phrase, reason = 422, "Unprocessable Content", "truncated_image"


class DeadlineExceeded(RequestError):
    """A request whose answer would come after its deadline, when nobody waits for it any more."""

    status, phrase, reason = 504, "Gateway Timeout", "deadline_exceeded"


class ModelError(RequestError):
    """A failure of the model or the handler, which is not the client's fault."""

    status, phrase, reason = 500, "Internal Server Error", "model_error"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest known word, else the list of known words."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def plain(text: object) -> str:
    """Return a text without the codes that colour a terminal or move its cursor."""
    return re.sub(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|[@-Z\\-_])", "", str(text))


def short(text: object, most: int = 200, end: bool = False) -> str:
    """Return a text, such as an error's, as one line for the middle of a sentence: its first or its last characters.

    Codes that colour a terminal are left out; an error without a text gives its class.
    """
    line = " ".join(plain(text).split())
    return (line[-most:] if end else line[:most]) or type(text).__name__
