"""Backends behind a name come, go, fall silent and send nonsense; DNS may not answer; which of them share the load."""

from __future__ import annotations

import dataclasses
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from archive.store import find_archives
from serve.gateway.discovery import Discovery, RemoteProbe, resolve
from serve.gateway.prober import Probe, Prober, Seen, together
from serve.gateway.settings import Backend, Name
from tests.serve.conftest import MakeArchive
from tests.serve.gateway.conftest import ONE_READY, Peer, settings_of, wait_for
from tests.serve.gateway.fake_dns import fake_getaddrinfo

READY = Seen(True, "ready", {"fake": {"1.0": ONE_READY}})
GONE = Seen(False, "gone")
ONE_SHUT, OTHER_SHUT = (Seen(False, "no workers", closed=frozenset({name})) for name in ("a@", "b@"))
TWO_SHUT = Seen(False, "no workers", closed=frozenset({"a@", "b@"}))


@pytest.fixture
def peer() -> Iterator[Peer]:
    found = Peer("127.0.0.2")
    yield found
    found.stop()


@pytest.fixture
def addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with the addresses of the name `backends`, for a fake DNS."""
    file = tmp_path / "addresses"
    file.write_text("")
    monkeypatch.setattr(socket, "getaddrinfo", fake_getaddrinfo("backends", file))
    return file


def look(peer: Peer) -> Seen:
    """Ask a backend once."""
    with closing(RemoteProbe(Backend(peer.url, "http://nowhere"))) as probe:
        return probe.look()


def test_a_name_is_looked_up_for_real() -> None:
    assert "127.0.0.1" in resolve(Name("localhost", 8080, 8081))
    assert resolve(Name("127.0.0.9", 8080, 8081)) == {"127.0.0.9"}


def test_a_name_that_does_not_exist_is_no_failure_of_dns(addresses: Path) -> None:
    name = Name("backends", 8080, 8081)
    assert resolve(name) == set()
    addresses.write_text("127.0.0.3\n127.0.0.2\n127.0.0.3")
    assert resolve(name) == {"127.0.0.2", "127.0.0.3"}
    addresses.write_text("away")
    with pytest.raises(OSError, match="Temporary failure"):
        resolve(name)


def test_backends_come_and_go_and_stay_while_dns_is_away(
    addresses: Path, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    changed = threading.Event()
    discovery = Discovery(Name("backends", peer.server.server_port, 9), changed.set)
    discovery.start()
    try:
        assert together(discovery.seen())["reason"] == "no backend is there"
        addresses.write_text("127.0.0.2")
        wait_for(lambda: discovery.members() == [peer.url])
        assert changed.wait(10)
        assert [one.backend for one in discovery.watched] == [Backend(peer.url, "http://127.0.0.2:9")]
        assert discovery.seen() == [READY]

        addresses.write_text("away")
        wait_for(lambda: "cannot be looked up now" in caplog.text)
        before = peer.pings
        wait_for(lambda: peer.pings >= before + 4)
        assert discovery.members() == [peer.url]
        # Once, and not at every look.
        assert caplog.text.count("cannot be looked up now") == 1

        with closing(Peer("127.0.0.3", peer.server.server_port)) as other:
            addresses.write_text("127.0.0.3\n127.0.0.2")
            wait_for(lambda: discovery.members() == [peer.url, other.url])
            addresses.write_text("127.0.0.3")
            wait_for(lambda: discovery.members() == [other.url])
        wait_for(lambda: discovery.members() == [])
        assert len(discovery.watched) == 1
        changed.clear()
        addresses.write_text("")
        wait_for(lambda: not discovery.watched)
        assert changed.wait(10)
    finally:
        discovery.stop()
    # A backend that left is not asked any more.
    wait_for(lambda: not any(thread.name == f"watch {peer.url}" for thread in threading.enumerate()))


def test_a_backend_is_ready_by_its_own_word(peer: Peer) -> None:
    # A backend of another release may say more.
    peer.ping = (200, {"status": "Healthy", "zone": "a", "models": {"fake": {"1.0": {**ONE_READY, "loading": 2}}}})
    assert look(peer) == READY
    assert together([look(peer), look(peer)])["models"] == {"fake": {"1.0": {"workers": 2, "ready": 2}}}
    reason = "0 of 1 workers of fake are ready"
    peer.ping = (503, {"status": "Unhealthy", "reason": reason, "models": {}})
    assert look(peer) == Seen(False, reason, {})
    # What did not start there makes nobody wait, and the predictions of it go to backends where it did.
    failed = {"b/1.0": "it needs a package"}
    said = {"status": "Healthy", "models": {"fake": {"1.0": ONE_READY}}, "closed": ["b@1.0"], "failed": failed}
    peer.ping = (200, said)
    seen = look(peer)
    assert seen == dataclasses.replace(READY, closed=frozenset({"b@1.0"}), failed=failed)
    assert together([seen]) == said
    assert together([seen, READY]) == {"status": "Healthy", "models": {"fake": {"1.0": {"workers": 2, "ready": 2}}}}
    # Something else than our gateway: the reason is its own message.
    peer.ping = (404, {"code": 404, "message": "no such thing"})
    assert look(peer) == Seen(False, "no such thing", {})


@pytest.mark.parametrize(
    "values",
    [
        [],
        "ready",
        {"models": 3},
        {"models": {"fake": 3}},
        {"models": {"fake": {"1.0": 3}}},
        {"models": {"fake": {"1.0": {"workers": "many", "ready": 1}}}},
        {"models": {"fake": {"1.0": {"workers": 1}}}},
    ],
    ids=str,
)
def test_nonsense_is_no_readiness(peer: Peer, values: object) -> None:
    peer.ping = (200, values)
    seen = look(peer)
    assert not seen.ready
    assert f"{peer.url} does not answer" in together([seen])["reason"]


def test_silence_counts_the_second_time_and_a_backend_comes_back_after_some_good_looks(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.gateway.discovery._ANSWER", 0.5)
    with closing(RemoteProbe(Backend(peer.url, "http://nowhere"))) as probe:

        def states(count: int) -> list[tuple[bool, str]]:
            found = []
            for _ in range(count):
                probe.seen = probe.look()
                found.append((probe.seen.ready, probe.seen.reason))
            return found

        ready, again = (True, "ready"), (False, "ready again a moment ago")
        assert states(1) == [ready]
        peer.silent = True
        assert states(2) == [ready, (False, f"{peer.url} does not answer (ReadTimeout)")]
        peer.silent = False
        assert states(4) == [again, again, ready, ready]
        # A refused connection is enough at once.
        peer.stop()
        assert states(1) == [(False, f"{peer.url} does not answer (ConnectionError)")]


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
def test_a_remote_backend_names_what_it_refuses_and_no_path(peer: Peer, said: object, closed: list[str]) -> None:
    peer.ping = (503, {"status": "Unhealthy", "reason": "x", "models": {}, "closed": said})
    seen = look(peer)
    assert (seen.ready, sorted(seen.closed), seen.open) == (False, closed, bool(closed))
