"""The backends behind a name: found by DNS, each watched by the `/ping` of its own gateway.

A name of Compose, of Swarm (`endpoint_mode: dnsrr`) or of a headless service resolves to the address of every
container. Each container's own gateway knows whether its workers are ready, so this gateway only asks that one.
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
# Seconds within which a backend sends its /ping, which is a file, unless the backend is gone or stuck.
_ANSWER = 2.0
_CLOSED = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*@([A-Za-z0-9][A-Za-z0-9_.-]*)?")


class RemoteProbe(Watched):
    """Asks the `/ping` of a backend on another host."""

    # A backend that stops goes on answering for longer (`beeline_drain_seconds`), so this gateway sees it in time.
    calm = Watched.hasty

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self._session = requests.Session()
        self._session.trust_env = False
        self._is_silent = False
        # Whether it was ready and then was not, and how many good looks in a row came since.
        self._left = False
        self._good = 0

    def look(self) -> Seen:
        seen = self._ask()
        # Each change reloads nginx, so a backend that left comes back after three good looks.
        self._good = self._good + 1 if seen.ready else 0
        if seen.ready and self._left and self._good < 3:
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
            failed = {str(name): str(why) for name, why in values.get("failed", {}).items()}
            seen = Seen(ready, reason, _counts(values.get("models", {})), _closed(values), failed)
            self._is_silent = False
            return seen
        except (requests.RequestException, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            was_silent, self._is_silent = self._is_silent, True
            # A refused connection is enough; silence may be one lost packet, so it counts the second time.
            if isinstance(error, requests.Timeout) and not was_silent:
                return self.seen
            return Seen(False, f"{self.backend.inference} does not answer ({type(error).__name__})")


class Discovery(Prober):
    """Looks a name up again and again, and watches a backend at each of its addresses."""

    def __init__(self, name: Name, changed: Callable[[], None]) -> None:
        super().__init__((), changed)
        self.name = name
        self._stop = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._look, name="discovery", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()
        super().stop()

    def update(self, addresses: set[str]) -> None:
        """Watch the backends at these addresses and no others from now on."""
        urls = [f"http://{address}" for address in sorted(addresses)]
        backends = [Backend(f"{url}:{self.name.port}", f"{url}:{self.name.management_port}") for url in urls]
        known = {one.backend: one for one in self.watched}
        new = [RemoteProbe(backend) for backend in backends if backend not in known]
        gone = [one for one in self.watched if one.backend not in backends]
        known |= {one.backend: one for one in new}
        self.watched = [known[backend] for backend in backends]
        for one in gone:
            logger.info("gone: %s", one.backend.inference)
            one.stop()
        for one in new:
            logger.info("found: %s", one.backend.inference)
            one.start(self._changed)
        if gone or new:
            self._changed()

    def _look(self) -> None:
        reported = ""
        while not self._stop.is_set():
            reason = ""
            try:
                addresses = resolve(self.name)
                # DNS may forget a name for a moment; backends that still answer stay then.
                if addresses or not self.members():
                    self.update(addresses)
            except Exception as error:
                # The known backends stay, and the thread goes on: without it no backend would be found any more.
                if not isinstance(error, OSError):
                    logger.exception("looking %s up failed", self.name.host)
                reason = str(error)
            if reason and reason != reported:
                logger.warning("%s cannot be looked up now: %s", self.name.host, reason)
            reported = reason
            self._stop.wait(0.5)


def _counts(models: Any) -> dict[str, dict[str, dict[str, int]]]:
    """Return the workers of every model as in `Seen`, without what only another release of the backend says."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for name, versions in models.items():
        for version, counts in versions.items():
            found.setdefault(str(name), {})[str(version)] = {key: int(counts[key]) for key in ("workers", "ready")}
    return found


def _closed(values: dict[str, Any]) -> frozenset[str]:
    """Return the predictions that a backend refuses while it takes others."""
    closed = frozenset(str(name) for name in values.get("closed", ()))
    # Files get these names.
    if wrong := [name for name in closed if not _CLOSED.fullmatch(name)]:
        raise ValueError(f"closed names {wrong[0]!r}")
    return closed


def resolve(name: Name) -> set[str]:
    """Return the IPv4 addresses of a name, none where the name does not exist; raise OSError when DNS is away."""
    try:
        # Backends listen on IPv4; a second address of one backend would count it twice.
        found = socket.getaddrinfo(name.host, name.port, family=socket.AF_INET, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
            return set()
        raise
    return {str(address[0]) for *_, address in found}
