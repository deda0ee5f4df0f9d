"""The backends that a name stands for: found by DNS, each watched by the `/ping` of its own gateway.

A name of Compose, of Swarm (`endpoint_mode: dnsrr`) or of a headless service resolves to the address of
every container. Each container's own gateway knows whether its workers are ready, so this one only asks it.
"""

from __future__ import annotations

import logging
import re
import socket
import threading
from collections.abc import Callable
from typing import Any

import requests

from serve.gateway.prober import Seen, fittest
from serve.gateway.settings import Backend, Name

logger = logging.getLogger("discovery")
# Seconds between two looks: at the name, and at each backend. A backend that stops goes on answering for
# longer than this (`beeline_drain_seconds`).
LOOK = 0.5
# A backend's /ping is a file; one that does not hand it out within this is gone or stuck. Seconds.
_ANSWER = 2.0
# Two in a row, since one may be lost.
_LOST = 2
_BACK = 3
_CLOSED = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*@([A-Za-z0-9][A-Za-z0-9_.-]*)?")


class Watched:
    """One backend and what its own `/ping` said last; watched by a thread until `stop`."""

    def __init__(self, backend: Backend, changed: Callable[[], None]) -> None:
        self.backend = backend
        self.seen = Seen(False, "not asked yet")
        self._changed = changed
        self._failed = self._good = 0
        self._left = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"watch {backend.inference}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ask no more; a question under way ends by itself."""
        self._stop.set()

    def look(self, session: requests.Session) -> Seen:
        """Ask once and return what is true now."""
        try:
            answer = session.get(f"{self.backend.inference}/ping", timeout=_ANSWER)
            values = answer.json()
            reason = "ready" if answer.status_code == 200 else str(values.get("reason", values.get("message")))
            ready = answer.status_code == 200
            seen = Seen(ready, reason, _counts(values.get("models", {})), frozenset() if ready else _closed(values))
            self._failed = 0
            return seen
        except (requests.RequestException, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            self._failed += 1
            # A refused connection says enough; silence may be a lost packet.
            if self._failed < _LOST and isinstance(error, requests.Timeout):
                return self.seen
            return Seen(False, f"{self.backend.inference} does not answer ({type(error).__name__})")

    def _calmed(self, seen: Seen) -> Seen:
        """Take one that was ready and then was not back after some good looks only: each change reloads nginx."""
        self._good = self._good + 1 if seen.ready else 0
        if seen.ready and self._left and self._good < _BACK:
            return Seen(False, "ready again a moment ago", seen.models, self.seen.closed)
        self._left = (self._left or self.seen.ready) and not seen.ready
        return seen

    def _watch(self) -> None:
        with requests.Session() as session:
            session.trust_env = False
            while not self._stop.is_set():
                before = self.seen
                try:
                    self.seen = self._calmed(self.look(session))
                except Exception as error:
                    # A thread that ended in silence would leave what was true then for ever.
                    logger.exception("looking at %s failed", self.backend.inference)
                    self.seen = Seen(False, f"looking at it failed ({type(error).__name__})")
                if self.seen != before:
                    self._changed()
                self._stop.wait(LOOK)


class Discovery:
    """Looks a name up again and again, and watches every address behind it; told apart by address.

    It stands where `Prober` does, before servers that have gateways of their own.
    """

    def __init__(self, name: Name, changed: Callable[[], None]) -> None:
        self.name = name
        self._changed = changed
        self._watched: dict[str, Watched] = {}
        self._away = ""
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="discovery", daemon=True)

    def start(self) -> None:
        """Start to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()
        with self._lock:
            for one in self._watched.values():
                one.stop()

    def seen(self) -> list[Seen]:
        """Return what is known of every backend."""
        return [one.seen for one in self._sorted()]

    def backends(self) -> list[Backend]:
        """Return every backend, ready or not."""
        return [one.backend for one in self._sorted()]

    def members(self) -> list[str]:
        """Return the inference addresses of the backends that share the load."""
        watched = self._sorted()
        return [watched[index].backend.inference for index in fittest([one.seen for one in watched])]

    def update(self, addresses: set[str]) -> None:
        """Watch these addresses and no others from now on."""
        with self._lock:
            gone = [address for address in self._watched if address not in addresses]
            for address in gone:
                self._watched.pop(address).stop()
            new = sorted(addresses - self._watched.keys())
            for address in new:
                host = f"[{address}]" if ":" in address else address
                backend = Backend(f"http://{host}:{self.name.port}", f"http://{host}:{self.name.management_port}")
                self._watched[address] = Watched(backend, self._changed)
        for what, which in (("found", new), ("gone", gone)):
            if which:
                logger.info("%s: %s", what, ", ".join(which))
        if gone or new:
            self._changed()

    def _sorted(self) -> list[Watched]:
        with self._lock:
            return [self._watched[address] for address in sorted(self._watched)]

    def _look(self) -> None:
        while not self._stop.is_set():
            away = ""
            try:
                found = resolve(self.name)
                # Whoever answers names may forget one for a moment. Those that still answer are there.
                if found or not self.members():
                    self.update(found)
            except OSError as error:
                # Whoever answers names is away; those that are known are watched on.
                away = str(error)
            except Exception as error:
                # A thread that ended in silence would find nobody any more.
                logger.exception("looking %s up failed", self.name.host)
                away = str(error)
            if away and away != self._away:
                logger.warning("%s cannot be looked up now: %s", self.name.host, away)
            self._away = away
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
    """Return what a backend that is not ready refuses while it takes other predictions.

    Raises:
        ValueError: for a name that is no model's; files are named after it.
    """
    closed = frozenset(str(name) for name in values.get("closed", ()))
    if wrong := [name for name in closed if not _CLOSED.fullmatch(name)]:
        raise ValueError(f"closed names {wrong[0]!r}")
    return closed


def resolve(name: Name) -> set[str]:
    """Return the addresses behind the name; none where nobody has it.

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
