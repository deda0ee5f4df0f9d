"""The gateway's own errors: for each status a type and one sentence, in the shape of the workers' errors."""

from __future__ import annotations

import json

_ERRORS = {
    400: ("BadRequest", "the request is no proper HTTP/1.1; send it with a common client"),
    403: (
        "Forbidden",
        "management takes no requests of web pages, and none from elsewhere; ask it with curl on this machine (in "
        "containers: where its address is another than the route outward, BEELINE_MANAGEMENT_FROM adds that)",
    ),
    404: ("NotFound", "there is nothing here; send a picture to /predictions/MODEL, /catalog.json lists the models"),
    405: ("MethodNotAllowed", "this address does not take that method; its Allow header names those it takes"),
    408: ("RequestTimeout", "the request did not arrive in time; send it without pauses of ten seconds"),
    409: (
        "SeveralBackends",
        "several backends share the load and this address cannot tell which is meant; change how many there are, or "
        "ask each by itself with `beeline serve scale` in its container",
    ),
    412: ("PreconditionFailed", "what the request asks for is not so; send it without If-Match"),
    413: ("TooManyBytes", "the request is larger than a picture of {max_image} bytes; send a smaller one"),
    414: ("UriTooLong", "the address is longer than any here; /catalog.json lists the models"),
    416: ("NoSuchRange", "the file is shorter than that; ask for all of it"),
    429: ("TooManyRequests", "the server has as many requests as it holds; try again after Retry-After seconds"),
    500: ("GatewayError", "the gateway failed; its log says why"),
    501: ("NotImplemented", "the request has a transfer encoding other than chunked; send it without"),
    502: ("BadGateway", "the server broke the connection; try again"),
    503: ("NotReady", "the server is not ready; /ping says why, try again after Retry-After seconds"),
    504: (
        "DeadlineExceeded",
        "no answer in time, which is {deadline} seconds at most; try again when the server is less busy",
    ),
    505: ("HttpVersion", "this version of HTTP is not spoken here; use HTTP/1.1"),
}
STATUSES = tuple(_ERRORS)


def body(status: int, max_image: int, deadline: int) -> str:
    """Return the JSON body of an error.

    Args:
        status: one of `STATUSES`.
        max_image: bytes of the largest picture.
        deadline: seconds for one prediction.
    """
    kind, sentence = _ERRORS[status]
    message = sentence.format(max_image=max_image, deadline=deadline)
    return json.dumps({"code": status, "type": kind, "message": message})
