"""The backends that a name stands for: found by DNS, each watched by the `/ping` of its own gateway.

A name of Compose, of Swarm (`endpoint_mode: dnsrr`) or of a headless service resolves to the address of every
container. Each container's own gateway knows whether its workers are ready, so this one only asks it.
"""

# ruff: noqa: D102 - an override is documented where it is declared

from __future__ import annotations

import logging
import re
import socket
import threading
from collections.abc import Callable
from typing import Any

import requests

from serve.gateway.prober import Prober, Seen, Watched
from serve.gateway.settings import Backend, Name

logger = logging.getLogger("discovery")
# Seconds between two lookups of the name.
LOOK = 0.5
# A backend's /ping is a file; a backend that does not send it within this is gone or stuck. Seconds.
_ANSWER = 2.0
# Two timeouts in a row, since one packet may be lost.
_LOST = 2
_BACK = 3
_CLOSED = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*@([A-Za-z0-9][A-Za-z0-9_.-]*)?")


class RemoteProbe(Watched):
    """Asks the `/ping` of a backend on another host."""

    # A backend that stops goes on answering for longer than this (`beeline_drain_seconds`).
    calm = Watched.hasty

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self._session = requests.Session()
        self._session.trust_env = False
        self._failed = self._good = 0
        self._left = False

    def look(self) -> Seen:
        seen = self._ask()
        # Each change reloads nginx: a backend that was ready and then was not comes back after several good looks.
        self._good = self._good + 1 if seen.ready else 0
        if seen.ready and self._left and self._good < _BACK:
            return Seen(False, "ready again a moment ago", seen.models, self.seen.closed)
        self._left = (self._left or self.seen.ready) and not seen.ready
        return seen

    def close(self) -> None:
        self._session.close()

    def _ask(self) -> Seen:
        try:
            answer = self._session.get(f"{self.backend.inference}/ping", timeout=_ANSWER)
            values = answer.json()
            ready = answer.status_code == 200
            reason = "ready" if ready else str(values.get("reason", values.get("message")))
            seen = Seen(ready, reason, _counts(values.get("models", {})), frozenset() if ready else _closed(values))
            self._failed = 0
            return seen
        except (requests.RequestException, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            self._failed += 1
            # A refused connection says enough; silence may be a lost packet.
            if self._failed < _LOST and isinstance(error, requests.Timeout):
                return self.seen
            return Seen(False, f"{self.backend.inference} does not answer ({type(error).__name__})")


class Discovery(Prober):
    """Looks a name up again and again, and watches the backend at every address that it resolves to."""

    def __init__(self, name: Name, changed: Callable[[], None]) -> None:
        super().__init__((), changed)
        self.name = name
        self._reason = ""
        self._stop = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._look, name="discovery", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()
        super().stop()

    def update(self, addresses: set[str]) -> None:
        """Watch these addresses and no others from now on."""
        backends = [
            Backend(f"http://{address}:{self.name.port}", f"http://{address}:{self.name.management_port}")
            for address in sorted(addresses)
        ]
        known = {one.backend: one for one in self._watched}
        new = [RemoteProbe(backend) for backend in backends if backend not in known]
        gone = [one for one in self._watched if one.backend not in backends]
        known |= {one.backend: one for one in new}
        self._watched = [known[backend] for backend in backends]
        for one in gone:
            logger.info("gone: %s", one.backend.inference)
            one.stop()
        for one in new:
            logger.info("found: %s", one.backend.inference)
            one.start(self._changed)
        if gone or new:
            self._changed()

    def _look(self) -> None:
        while not self._stop.is_set():
            reason = ""
            try:
                addresses = resolve(self.name)
                # DNS may forget a name for a moment; backends that still answer are kept then.
                if addresses or not self.members():
                    self.update(addresses)
            except OSError as error:
                # DNS is away; the known backends stay watched.
                reason = str(error)
            except Exception as error:
                # If the thread ended here, no backend would be found any more.
                logger.exception("looking %s up failed", self.name.host)
                reason = str(error)
            if reason and reason != self._reason:
                logger.warning("%s cannot be looked up now: %s", self.name.host, reason)
            self._reason = reason
            self._stop.wait(LOOK)


def _counts(models: Any) -> dict[str, dict[str, dict[str, int]]]:
    """Return the workers of every model as `Seen` has them, whatever else a backend of another release says."""
    return {
        str(name): {
            str(version): {key: int(counts[key]) for key in ("workers", "ready")}
            for version, counts in versions.items()
        }
        for name, versions in models.items()
    }


def _closed(values: dict[str, Any]) -> frozenset[str]:
    """Return the predictions that a backend refuses while it takes others.

    Raises:
        ValueError: for a name that is no model's; files are named after it.
    """
    closed = frozenset(str(name) for name in values.get("closed", ()))
    if wrong := [name for name in closed if not _CLOSED.fullmatch(name)]:
        raise ValueError(f"closed names {wrong[0]!r}")
    return closed


def resolve(name: Name) -> set[str]:
    """Return the IPv4 addresses of a name; none where the name does not exist.

    Raises:
        OSError: when that cannot be found out now.
    """
    try:
        # Backends listen on IPv4; a second address of the same one would count it twice.
        found = socket.getaddrinfo(name.host, name.port, family=socket.AF_INET, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
            return set()
        raise
    return {str(address[0]) for *_, address in found}
