"""The catalog of a backend on another host, copied: list, cards and sample pictures, so that the page has them."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import requests

from serve.gateway.layout import open_to_all
from serve.gateway.settings import Settings

logger = logging.getLogger("mirror")
# Seconds between two looks where the backends stay the same: workers tell what they chose a while after the start.
_AGAIN = 10.0
_ANSWER = 5.0
_MOST = 64 << 20
_CARD = re.compile(r"/catalog/[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+\.json")
_SAMPLE = re.compile(r"/samples/[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+/[A-Za-z0-9_-][A-Za-z0-9_.-]*")


class Mirror:
    """Keeps the document root's catalog as one of the backends has it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._members: tuple[str, ...] = ()
        self._source = ""
        self._due = 0.0

    def refresh(self, members: Sequence[str]) -> None:
        """Copy from one of the ready backends, where they changed or it is time; failing, keep what is there."""
        if tuple(members) == self._members and time.monotonic() < self._due:
            return
        # The last one that joined may serve a newer version, which is what all will serve.
        newest = next((one for one in members if one not in self._members), self._source)
        self._source = newest if newest in members else members[0]
        self._members, self._due = tuple(members), time.monotonic() + _AGAIN
        try:
            self._copy(self._source, len(members))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            logger.warning("the catalog of %s cannot be copied: %s", self._source, error)
            self._source = members[(members.index(self._source) + 1) % len(members)]
            self._due = time.monotonic() + 1

    def _copy(self, backend: str, members: int) -> None:
        with requests.Session() as session:
            session.trust_env = False
            catalog = json.loads(_get(session, f"{backend}/catalog.json"))
            for path in _paths(catalog):
                target = self.settings.web / path.lstrip("/")
                # A sample picture never changes; a card does.
                if _CARD.fullmatch(path) or not target.is_file():
                    _write(target, _get(session, backend + path))
        catalog["limits"]["in_flight"] *= members
        catalog["gateway"] = {"kind": self.settings.kind, "version": self.settings.version}
        # Last, when all that it names is there.
        _write(self.settings.web / "catalog.json", json.dumps(catalog, ensure_ascii=False, indent=1).encode())
        open_to_all(self.settings.web)


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


def _get(session: requests.Session, url: str) -> bytes:
    deadline, data = time.monotonic() + _ANSWER, bytearray()
    # A gateway sends nobody elsewhere.
    with session.get(url, timeout=_ANSWER, stream=True, allow_redirects=False) as answer:
        if answer.status_code != 200:
            raise ValueError(f"{url} is answered {answer.status_code}")
        for piece in answer.iter_content(1 << 16):
            data += piece
            if len(data) > _MOST:
                raise ValueError(f"{url} has more than {_MOST} bytes")
            if time.monotonic() > deadline:
                raise ValueError(f"{url} takes longer than {_ANSWER:g} s")
    return bytes(data)


def _write(path: Path, data: bytes) -> None:
    if path.is_file() and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(path.suffix + ".tmp")
    draft.write_bytes(data)
    draft.replace(path)
