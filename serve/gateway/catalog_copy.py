"""The catalog of a backend on another host, copied: list, cards and sample pictures, so that the page has them."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import requests

from host.files import write_whole
from serve.gateway.runtime import open_to_all
from serve.gateway.settings import Settings

logger = logging.getLogger("catalog")
# Seconds between two looks where the backends stay the same: workers tell what they chose a while after the start.
_AGAIN = 10.0
_ANSWER = 5.0
# Seconds that the first copy has before anything else that waits for it goes on.
_FIRST = 10.0
_MOST = 64 << 20
_CARD = re.compile(r"/catalog/[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+\.json")
_SAMPLE = re.compile(r"/samples/[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+/[A-Za-z0-9_-][A-Za-z0-9_.-]*")


class CatalogCopy:
    """Keeps the document root's catalog as one of the backends has it.

    `changed` is called in a thread of its own after each copy, a failed one too.
    """

    def __init__(self, settings: Settings, changed: Callable[[], None] = lambda: None) -> None:
        self.settings = settings
        self._changed = changed
        self._members: tuple[str, ...] = ()
        self._source = ""
        self._due = 0.0
        # What list and cards were when the last whole copy was made.
        self._copied = b""
        self._thread: threading.Thread | None = None
        self._since = 0.0
        self._ended = False
        self._stopped = threading.Event()

    @property
    def settled(self) -> bool:
        """Whether the first copy has ended, well or not, or has had its time."""
        return self._ended or (self._thread is not None and time.monotonic() > self._since + _FIRST)

    def follow(self, members: Sequence[str]) -> None:
        """Do what `refresh` does, in a thread, unless it is being done; return at once."""
        if (self._thread is not None and self._thread.is_alive()) or not self._wanted(members):
            return
        self._since = self._since if self._thread else time.monotonic()
        # A daemon: what a backend takes its time for does not hold up the gateway's end.
        self._thread = threading.Thread(target=self._follow, args=(tuple(members),), name="catalog copy", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End a copy that is under way; nothing is written any more."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(1.0)

    def _follow(self, members: Sequence[str]) -> None:
        self.refresh(members)
        self._ended = True
        self._changed()

    def _wanted(self, members: Sequence[str]) -> bool:
        return tuple(members) != self._members or time.monotonic() >= self._due

    def refresh(self, members: Sequence[str]) -> None:
        """Copy from one of the ready backends, where they changed or it is time; failing, keep what is there."""
        if not self._wanted(members):
            return
        # The last one that joined may serve a newer version, which is what all will serve.
        newest = next((one for one in members if one not in self._members), self._source)
        self._source = newest if newest in members else members[0]
        self._members, self._due = tuple(members), time.monotonic() + _AGAIN
        try:
            self._copy(self._source, len(members))
        except _Stopped:
            return
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            logger.warning("the catalog of %s cannot be copied: %s", self._source, error)
            self._source = members[(members.index(self._source) + 1) % len(members)]
            self._due = time.monotonic() + 1

    def _copy(self, backend: str, members: int) -> None:
        with requests.Session() as session:
            session.trust_env = False
            listed = self._get(session, f"{backend}/catalog.json")
            catalog = json.loads(listed)
            paths = list(_paths(catalog))
            cards = {path: self._get(session, backend + path) for path in paths if _CARD.fullmatch(path)}
            # Pictures of one name are the same ones while list and cards are: a card has the model's fingerprint.
            found = hashlib.sha256(b"\0".join((listed, *cards.values()))).digest()
            for path in (path for path in paths if path not in cards):
                target = self._target(path)
                if found != self._copied or not target.is_file():
                    _write(target, self._get(session, backend + path))
        for path, card in cards.items():
            _write(self._target(path), card)
        catalog["limits"]["in_flight"] *= members
        catalog["gateway"] = {"kind": "nginx", "version": self.settings.version}
        # Last, when all that it names is there.
        _write(self.settings.web / "catalog.json", json.dumps(catalog, ensure_ascii=False, indent=1).encode())
        self._remove_all_but({self._target(path) for path in paths})
        open_to_all(self.settings.web)
        self._copied = found

    def _target(self, path: str) -> Path:
        return self.settings.web / path.lstrip("/")

    def _remove_all_but(self, wanted: AbstractSet[Path]) -> None:
        for top in (self.settings.web / "catalog", self.settings.web / "samples"):
            # What a folder holds comes before the folder.
            for path in sorted(top.rglob("*"), reverse=True):
                if path.is_dir():
                    if not any(path.iterdir()):
                        path.rmdir()
                elif path not in wanted:
                    path.unlink()

    def _get(self, session: requests.Session, url: str) -> bytes:
        data = _get(session, url, self._stopped)
        if self._stopped.is_set():
            raise _Stopped
        return data


class _Stopped(Exception):
    """The gateway ends, and so does the copy."""


def _paths(catalog: dict[str, Any]) -> Iterator[str]:
    """Yield the paths that the catalog names, those alone that a gateway serves.

    Raises:
        ValueError: for another one, or one that leaves its folder.
    """
    for model in catalog["models"]:
        for path in (model["card"], *(sample["url"] for sample in model["samples"])):
            if not (_CARD.fullmatch(path) or _SAMPLE.fullmatch(path)) or ".." in path.split("/"):
                raise ValueError(f"its catalog names {path!r}, which is no path of a gateway")
            yield path


def _get(session: requests.Session, url: str, stopped: threading.Event) -> bytes:
    deadline, data = time.monotonic() + _ANSWER, bytearray()
    # A gateway sends nobody elsewhere.
    with session.get(url, timeout=_ANSWER, stream=True, allow_redirects=False) as answer:
        if answer.status_code != 200:
            raise ValueError(f"{url} is answered {answer.status_code}")
        for piece in answer.iter_content(1 << 16):
            data += piece
            if len(data) > _MOST:
                raise ValueError(f"{url} has more than {_MOST} bytes")
            if stopped.is_set():
                break
            if time.monotonic() > deadline:
                raise ValueError(f"{url} takes longer than {_ANSWER:g} s")
    return bytes(data)


def _write(path: Path, data: bytes) -> None:
    if path.is_file() and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data)
