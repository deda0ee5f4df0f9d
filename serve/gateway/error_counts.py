"""How many answers were the gateway's own, by status: counted from its access log, which names who answered."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.gateway import errors

# As nginx writes it, and as Python's json does. A client's own words cannot look so: their quotes are escaped.
_OWN = re.compile(rb'"status": ?(\d{3}), ?"from": ?"gateway"')
# Seconds for which a renamed log may still get lines: whoever writes it keeps some back for one.
_LATE = 3.0
_LONGEST_LINE = 1 << 20


class ErrorCounts(Collector):
    """Reads what is added to the log, through rotation; what is in it at first was counted by somebody before.

    `/ping` is not in the log, and so its 503 not among them.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._counts: Counter[int] = Counter()
        self._file = self._open()
        self._begun = b""
        self._renamed: float | None = None
        if self._file is not None:
            self._file.seek(0, os.SEEK_END)

    def read(self) -> None:
        """Count what was added since."""
        with self._lock:
            self._take()
            newer = self._newer()
            if newer is None:
                return
            now = time.monotonic()
            self._renamed = self._renamed or now
            if self._file is not None and now - self._renamed < _LATE:
                newer.close()
                return
            self.close()
            self._file, self._begun, self._renamed = newer, b"", None
            self._take()

    def collect(self) -> Iterator[Metric]:
        """Return the one metric; called on each scrape, by any thread."""
        self.read()
        family = CounterMetricFamily(
            "beeline_gateway_answers", "Errors that the gateway itself answered, by HTTP status.", labels=["status"]
        )
        for status in errors.STATUSES:
            family.add_metric([str(status)], self._counts[status])
        yield family

    def close(self) -> None:
        """Close the log."""
        if self._file is not None:
            self._file.close()

    def _take(self) -> None:
        if self._file is not None:
            whole, _, self._begun = (self._begun + self._file.read()).rpartition(b"\n")
            self._counts.update(map(int, _OWN.findall(whole)))
            self._begun = self._begun[:_LONGEST_LINE]

    def _open(self) -> IO[bytes] | None:
        try:
            return self._log.open("rb")
        except OSError:
            # Not yet, or just now renamed.
            return None

    def _newer(self) -> IO[bytes] | None:
        """Return the file of that name where it is another than the open one."""
        file = self._open()
        if file is not None and self._file is not None and os.path.sameopenfile(file.fileno(), self._file.fileno()):
            file.close()
            return None
        return file
