"""The gateway's own errors: a type and a sentence for each status, in the shape of the workers', and their counts."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.instance.logs import Followed

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
# As nginx writes it. A client's own words cannot look so: their quotes are escaped.
_OWN = re.compile(r'"status":(\d{3}),"from":"gateway"')
# Seconds for which a renamed log may still get lines: whoever writes it keeps some back for one.
_LATE = 3.0


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


class ErrorCounts(Collector):
    """Counts the gateway's own answers from its access log, which names who answered; through rotation.

    What is in it at first was counted by somebody before. `/ping` is not in the log, and so its 503 not among them.
    """

    def __init__(self, log: Path) -> None:
        self.log = Followed(log, _LATE)
        self._lock = threading.Lock()
        self._counts: Counter[int] = Counter()

    def read(self) -> None:
        """Count what was added since."""
        with self._lock:
            self._counts.update(int(own[1]) for line in self.log.added() if (own := _OWN.search(line)))

    def collect(self) -> Iterator[Metric]:
        """Return the one metric; called on each scrape, by any thread."""
        self.read()
        family = CounterMetricFamily(
            "beeline_gateway_answers", "Errors that the gateway itself answered, by HTTP status.", labels=["status"]
        )
        for status in STATUSES:
            family.add_metric([str(status)], self._counts[status])
        yield family
