"""A server's context, asked and told the same way on TorchServe and Multi Model Server."""

from __future__ import annotations

import re
from typing import Any

from beeline.answer import Answer

_UNSAFE = re.compile(r"[^\x20-\x7e]")


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


def _safe(text: object) -> str:
    return _UNSAFE.sub("?", str(text))
