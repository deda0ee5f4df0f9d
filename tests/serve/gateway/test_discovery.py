"""Backends behind a name come, go, fall silent and talk nonsense; DNS itself may be away."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from serve.gateway.discovery import Discovery, RemoteProbe, resolve
from serve.gateway.prober import Seen, together
from serve.gateway.settings import Backend, Name
from tests.serve.gateway.conftest import ONE_READY, Peer
from tests.serve.gateway.fake_dns import fake_getaddrinfo

READY = Seen(True, "ready", {"fake": {"1.0": ONE_READY}})


@pytest.fixture
def peer() -> Iterator[Peer]:
    found = Peer("127.0.0.2")
    yield found
    if not found.stopped.is_set():
        found.stop()


@pytest.fixture
def addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the name `backends` resolves to, by a fake DNS."""
    file = tmp_path / "addresses"
    file.write_text("")
    monkeypatch.setattr(socket, "getaddrinfo", fake_getaddrinfo("backends", file))
    return file


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def look(peer: Peer) -> Seen:
    """Ask a backend once."""
    with closing(RemoteProbe(Backend(peer.url, "http://nowhere"))) as probe:
        return probe.look()


def test_a_name_is_looked_up_for_real() -> None:
    assert "127.0.0.1" in resolve(Name("localhost", 8080, 8081))
    assert resolve(Name("127.0.0.9", 8080, 8081)) == {"127.0.0.9"}


def test_nobody_has_the_name_or_whoever_knows_is_away(addresses: Path) -> None:
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
    caplog.set_level(logging.INFO, logger="discovery")
    changed = threading.Event()
    discovery = Discovery(Name("backends", peer.server.server_port, 9), changed.set)
    discovery.start()
    try:
        assert discovery.members() == []
        assert together(discovery.seen())["reason"] == "no backend is there"
        addresses.write_text("127.0.0.2")
        wait_for(lambda: discovery.members() == [peer.url])
        assert changed.wait(10)
        assert discovery.backends() == [Backend(peer.url, "http://127.0.0.2:9")]
        assert discovery.seen() == [READY]

        addresses.write_text("away")
        wait_for(lambda: "cannot be looked up now" in caplog.text)
        asked = peer.pings
        wait_for(lambda: peer.pings >= asked + 4)
        assert discovery.members() == [peer.url]
        # Once, and not at every look.
        assert caplog.text.count("cannot be looked up now") == 1

        other = Peer("127.0.0.3", peer.server.server_port)
        try:
            addresses.write_text("127.0.0.3\n127.0.0.2")
            wait_for(lambda: discovery.members() == [peer.url, other.url])
            addresses.write_text("127.0.0.3")
            wait_for(lambda: discovery.members() == [other.url])
        finally:
            other.stop()
        wait_for(lambda: discovery.members() == [])
        assert len(discovery.backends()) == 1
        changed.clear()
        addresses.write_text("")
        wait_for(lambda: discovery.backends() == [])
        assert changed.wait(10)
    finally:
        discovery.stop()
    # A backend that left is not asked any more.
    wait_for(lambda: not any(thread.name == f"watch {peer.url}" for thread in threading.enumerate()))


def test_it_is_ready_by_its_own_word(peer: Peer) -> None:
    assert look(peer) == READY
    reason = "0 of 1 workers of fake are ready"
    peer.ping = (503, {"status": "Unhealthy", "reason": reason, "models": {}})
    assert look(peer) == Seen(False, reason, {})
    # Not one of our gateways: its words are shown.
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
def test_nonsense_is_no_readiness_and_ends_no_gateway(peer: Peer, values: object) -> None:
    peer.ping = (200, values)
    seen = look(peer)
    assert not seen.ready
    assert f"{peer.url} does not answer" in together([seen])["reason"]


def test_a_backend_of_another_release_may_say_more(peer: Peer) -> None:
    peer.ping = (200, {"status": "Healthy", "zone": "a", "models": {"fake": {"1.0": {**ONE_READY, "loading": 2}}}})
    assert look(peer) == READY
    assert together([look(peer), look(peer)])["models"] == {"fake": {"1.0": {"workers": 2, "ready": 2}}}


def test_silence_once_is_a_lost_packet_twice_is_an_end(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.gateway.discovery._ANSWER", 1.0)
    monkeypatch.setattr(RemoteProbe, "calm", 0.01)
    monkeypatch.setattr(RemoteProbe, "hasty", 0.01)
    seen: list[Seen] = []
    watched = RemoteProbe(Backend(peer.url, "http://nowhere"))
    watched.start(lambda: seen.append(watched.seen))
    try:
        wait_for(lambda: watched.seen == READY)
        asked = peer.pings
        peer.silent = True
        wait_for(lambda: not watched.seen.ready)
        assert watched.seen.reason == f"{peer.url} does not answer (ReadTimeout)"
        assert peer.pings >= asked + 2
        peer.silent = False
        wait_for(lambda: watched.seen == READY)
        # A refused connection says enough at once.
        peer.stop()
        wait_for(lambda: not watched.seen.ready)
        assert "ConnectionError" in watched.seen.reason

        # Back after some good looks only, which is said in between.
        def ended_twice() -> bool:
            # On a busy machine it may have been silent once more in between.
            states = iter([one.ready for one in seen])
            return all(wanted in states for wanted in (True, False, True, False))

        wait_for(ended_twice)
        assert "ready again a moment ago" in [one.reason for one in seen]
    finally:
        watched.stop()
