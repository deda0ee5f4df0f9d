"""One request at the development proxy and what became of it, as the access log tells it."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from datetime import datetime

import aiohttp.web

# The status in the log where the client left before its answer, as nginx writes it.
CLIENT_GONE = 499


@dataclass
class Exchange:
    """One request as the access log tells it; `backends` holds every server that was tried."""

    request: aiohttp.web.BaseRequest
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    begun: float = field(default_factory=time.monotonic)
    # Until there is an answer: nobody is there any more to get one.
    status: int = CLIENT_GONE
    bytes_in: int = 0
    backends: list[str] = field(default_factory=list)
    # Whether the answer is a server's, and not the gateway's own.
    answered: bool = False

    def line(self, response: aiohttp.web.Response | None) -> str:
        """Return the log's line; without a response there is none."""
        request, back = self.request, response.headers if response is not None else {}
        values = {
            "time": datetime.now().astimezone().isoformat(timespec="milliseconds"),
            "id": self.id,
            "client": request.remote,
            "request": f"{request.method} {request.raw_path} HTTP/{request.version.major}.{request.version.minor}",
            "status": self.status,
            "from": "server" if self.answered else "gateway",
            "bytes_in": self.bytes_in,
            "bytes_out": 0 if response is None else response.content_length or 0,
            "seconds": round(time.monotonic() - self.begun, 3),
            "backend": ", ".join(self.backends),
            "batch_size": back.get("X-Batch-Size", ""),
            "timing": back.get("Server-Timing", ""),
            "agent": request.headers.get("User-Agent", ""),
        }
        return json.dumps(values) + "\n"
