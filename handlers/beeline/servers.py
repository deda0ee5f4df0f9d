"""What TorchServe and Multi Model Server do differently: their contexts, and how their front ends read answers."""

from __future__ import annotations

import re
from typing import Any

from beeline.answer import Answer

_UNSAFE = re.compile(r"[^\x20-\x7e]")
# How long the message of a batch is made on Multi Model Server: with its code and its length, 20 KiB.
_MESSAGE_BYTES = 20 * 1024 - 8


def swallows_errors(context: Any) -> bool:
    """Say whether the server goes on after `initialize` raised: MMS does (`mms/model_loader.py`).

    Both servers call themselves "MMS" in `system_properties`; only TorchServe's context has a model
    configuration.
    """
    return not hasattr(context, "model_yaml_config")


def header(context: Any, index: int, name: str) -> str | None:
    """Return request `index`'s header, whatever the case the client wrote its name in.

    Both servers keep names as they were sent, and put a multipart field's content type into the same
    dict under the field's name: only text is a header's value.
    """
    for key, value in context.get_all_request_header(index).items():
        if isinstance(key, str) and isinstance(value, str) and key.lower() == name:
            return value
    return None


def send(context: Any, index: int, answer: Answer) -> str:
    """Set status, headers and content type of request `index`; return the body for the server's list.

    Whatever could break a response (a line break in a phrase kills TorchServe's worker, in a header MMS
    really sends it) is replaced here, for answers of overridden stages too.
    """
    context.set_response_status(int(answer.status), _safe(answer.phrase), index)
    for name, value in answer.headers.items():
        if str(name).lower() == "content-type":
            context.set_response_content_type(index, _safe(value))
        else:
            context.set_response_header(index, _safe(name), _safe(value))
    return str(answer.body)


def keep_answers_whole() -> None:
    """Pad the message of every answered batch of this worker; to be called on Multi Model Server only.

    `CodecUtils.readMap` of its `model-server.jar` takes a header that is not there yet for a corrupt frame, closes the
    connection and fails the whole batch with "Worker died"; every other field waits for its rest. Netty reads as much
    at a time as the last answers were long, so a full batch after some lone requests is cut somewhere. TorchServe has
    mended this.

    The status message comes before the answers, can be cut without harm and is shown to nobody. Padded to 20 KiB, every
    read that is cut is cut inside it, Netty's guess grows to its largest, 64 KiB, and never falls, since no answer is
    under a quarter of that.
    """
    from mms import service

    create = service.create_predict_response

    def padded(ret: Any, ids: Any, message: str, code: int, context: Any = None) -> Any:
        # Without a context it is an error, whose message goes to the client.
        return create(ret, ids, message.ljust(_MESSAGE_BYTES) if context else message, code, context=context)

    service.create_predict_response = padded


def _safe(text: object) -> str:
    return _UNSAFE.sub("?", str(text))
