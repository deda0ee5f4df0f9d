"""Which backends share the load while some models of some of them are not ready."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import requests

from archive.store import find_archives
from serve.gateway.discovery import RemoteProbe
from serve.gateway.prober import Probe, Seen, closed_together, fittest, together
from serve.gateway.settings import Backend
from tests.serve.conftest import MakeArchive
from tests.serve.gateway.conftest import Cluster, Peer, settings_of, wait_for

READY = Seen(True, "ready")
GONE = Seen(False, "gone")
ONE_SHUT, OTHER_SHUT = (Seen(False, "no workers", closed=frozenset({name})) for name in ("a@", "b@"))
TWO_SHUT = Seen(False, "no workers", closed=frozenset({"a@", "b@"}))


@pytest.mark.parametrize(
    ("seen", "members", "closed"),
    [
        ([], [], set()),
        ([GONE, GONE], [], set()),
        ([READY, GONE, READY], [0, 2], set()),
        ([ONE_SHUT, READY], [1], set()),
        ([GONE, ONE_SHUT], [1], {"a@"}),
        ([TWO_SHUT, ONE_SHUT, ONE_SHUT], [1, 2], {"a@"}),
        ([OTHER_SHUT, ONE_SHUT], [1], {"a@"}),
    ],
)
def test_those_that_take_the_most(seen: list[Seen], members: list[int], closed: set[str]) -> None:
    assert fittest(seen) == members
    assert closed_together(seen) == closed
    assert together(seen).get("closed", []) == sorted(closed)


def test_a_prediction_without_a_version_is_the_default_ones(make_fake: MakeArchive, tmp_path: Path) -> None:
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
    [
        (["a@", "a@1.0"], {"a@", "a@1.0"}),
        ([], set()),
        (["../../x@"], set()),
        (["a"], set()),
        ([None], set()),
        (7, set()),
    ],
    # A set's order is another one in each process.
    ids=lambda value: "" if isinstance(value, set) else str(value),
)
def test_a_backend_of_another_host_names_what_it_refuses(said: object, closed: set[str]) -> None:
    """Files are named after it: what could not be a model is no answer."""
    peer = Peer("127.0.0.2")
    try:
        peer.ping = (503, {"status": "Unhealthy", "reason": "x", "models": {}, "closed": said})
        with closing(RemoteProbe(Backend(peer.url, "http://nowhere"))) as probe:
            seen = probe.look()
        assert (seen.ready, seen.closed) == (False, closed)
        assert seen.open == bool(closed)
    finally:
        peer.stop()


@pytest.mark.server
def test_a_model_that_fails_everywhere_closes_no_other_through_two_gateways(cluster: Cluster) -> None:
    backend = cluster.backend(cluster.HOSTS[0], models=("fake", "other"))
    cluster.resolve_to(cluster.HOSTS[0])
    site = cluster.gateway()

    def asked() -> list[int]:
        urls = (f"{site.url}/predictions/{model}" for model in ("fake", "other"))
        return [requests.post(url, data="x", timeout=30).status_code for url in urls]

    assert asked() == [200, 200]
    backend.backends[0].away.add("other")
    assert site.wait_until(ready=False)["closed"] == ["other@", "other@1.0"]
    wait_for(asked, lambda seen: seen == [200, 503])
    assert site.predict().json() == {"red": 0.9, "other": 0.1}
    backend.backends[0].away.clear()
    site.wait_until(ready=True)
    wait_for(asked, lambda seen: seen == [200, 200])
