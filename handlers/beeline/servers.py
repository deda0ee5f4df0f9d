"""Where TorchServe and Multi Model Server differ: their contexts, and how their front ends read answers."""

from __future__ import annotations

import logging
import re
import time
from typing import Any

from beeline.answer import Answer

logger = logging.getLogger(__name__)

_UNSAFE = re.compile(r"[^\x20-\x7e]")
# The length of a batch's message on Multi Model Server: 20 KiB with its code and its length.
_MESSAGE_BYTES = 20 * 1024 - 8


def swallows_errors(context: Any) -> bool:
    """Return whether the server continues after `initialize` raises: MMS does (`mms/model_loader.py`).

    Both servers call themselves "MMS" in `system_properties`; only TorchServe's context has a model configuration.
    """
    return not hasattr(context, "model_yaml_config")


def header(context: Any, index: int, name: str) -> str | None:
    """Return request `index`'s header, without regard to the case of its name, which both servers keep.

    They put a multipart field's content type into the same dict under the field's name; only text is a header's value.
    An error is logged, and there is no header.
    """
    try:
        for key, value in context.get_all_request_header(index).items():
            if isinstance(key, str) and isinstance(value, str) and key.lower() == name:
                return value
    except Exception:
        logger.exception("request %d's headers cannot be read", index)
    return None


def queue_milliseconds(request_start: object, now: float | None = None) -> float | None:
    """Return the milliseconds since `X-Request-Start`, which the gateway sets; None without a plausible one.

    Both times are seconds since the epoch, the header's as `t=1700000000.123` or without the `t=`; `now` is for tests.
    """
    if not isinstance(request_start, str):
        return None
    try:
        waited = (time.time() if now is None else now) - float(request_start.removeprefix("t="))
    except ValueError:
        return None
    # A negative time, or over an hour, means another clock or unit: it is left out.
    return waited * 1000 if 0 <= waited < 3600 else None


def deadline(waited: float | None, own: str | None, seconds: int) -> float | None:
    """Return when a request is too late, by `time.time`; None without the milliseconds that it has waited.

    That is `seconds` after it came, or as many milliseconds as its `X-Deadline-Ms` says where they are fewer.
    """
    if waited is None:
        return None
    # Longer numbers are over any limit, and Python refuses to parse the longest.
    is_number = own is not None and own.isascii() and own.isdigit() and len(own) < 10
    return time.time() + (min(int(str(own)) / 1000, seconds) if is_number else seconds) - waited / 1000


def send(context: Any, index: int, answer: Answer) -> str:
    """Set status, headers and content type of request `index`; return the body for the server's list.

    Characters that could break a response are replaced, also in answers of overridden stages: a line break in a phrase
    kills TorchServe's worker, and MMS sends one in a header unchanged.
    """
    context.set_response_status(int(answer.status), _safe(answer.phrase), index)
    for name, value in answer.headers.items():
        if str(name).lower() == "content-type":
            context.set_response_content_type(index, _safe(value))
        else:
            context.set_response_header(index, _safe(name), _safe(value))
    return str(answer.body)


def keep_answers_whole() -> None:
    """Pad the message of every answered batch of this worker, on Multi Model Server only.

    If a read ends inside a header, `CodecUtils.readMap` of `model-server.jar` takes the frame for corrupt, closes the
    connection and fails the whole batch with "Worker died"; inside other fields it waits for the rest. Netty reads as
    much at a time as the last answers were long, so it cuts a full batch after some lone requests. TorchServe has fixed
    this.

    The status message precedes the answers, survives a cut, and nobody sees it. At 20 KiB it takes every cut, and
    Netty's guess grows to its maximum of 64 KiB and stays there, since no answer is under a quarter of that.
    """
    from mms import service

    create = service.create_predict_response

    def padded(ret: Any, ids: Any, message: str, code: int, context: Any = None) -> Any:
        # Without a context it is an error, and the client gets its message.
        return create(ret, ids, message.ljust(_MESSAGE_BYTES) if context else message, code, context=context)

    service.create_predict_response = padded


def _safe(text: object) -> str:
    return _UNSAFE.sub("?", str(text))
