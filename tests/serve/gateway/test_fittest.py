"""Which backends share the load while some models of some of them are not ready."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from archive.store import find_archives
from serve.gateway.discovery import RemoteProbe
from serve.gateway.prober import Probe, Prober, Seen, together
from serve.gateway.settings import Backend
from tests.serve.conftest import MakeArchive
from tests.serve.gateway.conftest import Peer, settings_of

READY = Seen(True, "ready")
GONE = Seen(False, "gone")
ONE_SHUT, OTHER_SHUT = (Seen(False, "no workers", closed=frozenset({name})) for name in ("a@", "b@"))
TWO_SHUT = Seen(False, "no workers", closed=frozenset({"a@", "b@"}))


@pytest.mark.parametrize(
    ("seen", "members", "closed"),
    [
        ([], [], []),
        ([GONE, GONE], [], []),
        ([READY, GONE, READY], [0, 2], []),
        ([ONE_SHUT, READY], [1], []),
        ([GONE, ONE_SHUT], [1], ["a@"]),
        ([TWO_SHUT, ONE_SHUT, ONE_SHUT], [1, 2], ["a@"]),
        ([OTHER_SHUT, ONE_SHUT], [1], ["a@"]),
    ],
)
def test_the_backends_that_take_the_most_share_the_load(
    seen: list[Seen], members: list[int], closed: list[str]
) -> None:
    watched: list[Any] = [SimpleNamespace(backend=Backend(str(i), ""), seen=one) for i, one in enumerate(seen)]
    assert Prober(watched, print).members() == list(map(str, members))
    assert together(seen).get("closed", []) == closed


def test_a_prediction_without_a_version_is_for_the_default_version(make_fake: MakeArchive, tmp_path: Path) -> None:
    make_fake(tmp_path, "a")
    make_fake(tmp_path, "b")
    a, b = find_archives(tmp_path)
    backend = Backend("http://127.0.0.1:1", "http://127.0.0.1:2")
    for defaults, closed in (({"a": "1.0"}, {"a@", "a@1.0"}), ({"a": "2.0"}, {"a@1.0"}), ({}, {"a@", "a@1.0"})):
        with closing(Probe(backend, (a, b), settings_of(tmp_path, defaults=defaults))) as probe:
            assert probe._closed([a]) == closed
            assert probe._closed([a, b]) == set()


@pytest.mark.parametrize(
    ("said", "closed"),
    [(["a@", "a@1.0"], ["a@", "a@1.0"]), ([], []), (["../../x@"], []), (["a"], []), ([None], []), (7, [])],
    ids=str,
)
def test_a_remote_backend_names_what_it_refuses_and_no_path(said: object, closed: list[str]) -> None:
    peer = Peer("127.0.0.2")
    peer.ping = (503, {"status": "Unhealthy", "reason": "x", "models": {}, "closed": said})
    with closing(RemoteProbe(Backend(peer.url, "http://nowhere"))) as probe:
        seen = probe.look()
    peer.stop()
    assert (seen.ready, sorted(seen.closed), seen.open) == (False, closed, bool(closed))
