"""The catalog of a backend on another host is copied, and nothing that does not belong there."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.gateway.mirror import Mirror
from serve.gateway.settings import Name, Settings
from tests.serve.gateway.conftest import Peer


@pytest.fixture
def peers() -> Iterator[list[Peer]]:
    found = [Peer("127.0.0.2"), Peer("127.0.0.3")]
    yield found
    for peer in found:
        if not peer.stopped.is_set():
            peer.stop()


@pytest.fixture
def mirror(tmp_path: Path) -> Mirror:
    folder = tmp_path / "gateway"
    (folder / "web").mkdir(parents=True)
    values: dict[str, Any] = {"folder": folder, "program": "nginx", "version": "1.22.1", "listen": (), "backends": ()}
    numbers = ("max_body", "max_image", "in_flight", "per_second", "deadline", "drain", "stop", "processes")
    values |= dict.fromkeys((*numbers, "log_megabytes", "log_files"), 1)
    name = Name("backends", 8080, 8081)
    return Mirror(Settings(store=None, versions=False, logs=tmp_path, name=name, **values))


def catalog(mirror: Mirror) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((mirror.settings.web / "catalog.json").read_text())
    return values


def files(mirror: Mirror) -> list[str]:
    """Everything below the runtime folder's parent, the document root's own files by their path in it."""
    top = mirror.settings.folder.parent
    return sorted(str(path.relative_to(top)) for path in top.rglob("*") if path.is_file())


def test_list_cards_and_samples_are_copied(mirror: Mirror, peers: list[Peer]) -> None:
    peers[0].offer(content=b'{"spec": 1}')
    mirror.refresh([peer.url for peer in peers[:1]])
    web = mirror.settings.web
    assert (web / "catalog/fake/1.0.json").read_bytes() == b'{"spec": 1}'
    assert (web / "samples/fake/1.0/a.png").read_bytes() == b"a picture"
    assert catalog(mirror)["gateway"] == {"kind": "nginx", "version": "1.22.1"}
    assert catalog(mirror)["limits"]["in_flight"] == 4
    # nginx's workers are nobody.
    assert (web / "samples").stat().st_mode & 0o777 == 0o755
    assert (web / "catalog.json").stat().st_mode & 0o777 == 0o644
    mirror.refresh([peer.url for peer in peers[:1]])
    assert peers[0].seen.count("/catalog.json") == 1, "nothing changed and it is not time yet"


def test_cards_are_copied_again_when_it_is_time_and_samples_are_not(
    mirror: Mirror, peers: list[Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.gateway.mirror._AGAIN", 0.0)
    for card in (b"{}", b'{"serving": {}}'):
        peers[0].offer(content=card)
        mirror.refresh([peers[0].url])
        assert (mirror.settings.web / "catalog/fake/1.0.json").read_bytes() == card
    assert peers[0].seen.count("/samples/fake/1.0/a.png") == 1


def test_the_one_that_joined_last_says_what_is_served(
    mirror: Mirror, peers: list[Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.gateway.mirror._AGAIN", 0.0)
    old, new = peers
    old.offer("1.0")
    new.offer("2.0")
    mirror.refresh([old.url])
    assert catalog(mirror)["models"][0]["version"] == "1.0"
    # Again and again, not only when it joins.
    for _ in range(2):
        mirror.refresh([old.url, new.url])
        assert catalog(mirror)["models"][0]["version"] == "2.0"
        assert catalog(mirror)["limits"]["in_flight"] == 8
    mirror.refresh([old.url])
    assert catalog(mirror)["models"][0]["version"] == "1.0"


def test_where_one_cannot_be_copied_the_next_is(
    mirror: Mirror, peers: list[Peer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="mirror")
    good, bad = peers
    good.offer()
    bad.stop()
    mirror.refresh([bad.url])
    assert f"the catalog of {bad.url} cannot be copied" in caplog.text
    assert files(mirror) == []
    mirror.refresh([bad.url])
    assert len(caplog.records) == 1, "it is not time to try again yet"
    mirror.refresh([good.url, bad.url])
    assert catalog(mirror)["models"][0]["version"] == "1.0"


def test_a_failure_is_tried_with_another_backend(
    mirror: Mirror, peers: list[Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = peers
    good.offer()
    bad.stop()
    # It is the first of both, and both joined at once.
    members = [bad.url, good.url]
    mirror.refresh(members)
    assert files(mirror) == []
    mirror._due = 0.0
    mirror.refresh(members)
    assert catalog(mirror)["models"][0]["version"] == "1.0"


@pytest.mark.parametrize(
    "path",
    [
        "/catalog/../../evil.json",
        "/catalog/../evil.json",
        "/catalog/fake/../../evil.json",
        "/etc/passwd",
        "//catalog/fake/1.0.json",
        "catalog/fake/1.0.json",
        "/index.html",
        "/catalog.json",
        "/scripts/page.js",
        "/catalog/fake/1.0.json\n",
        "/catalog/fa ke/1.0.json",
        "/catalog/fake%2f..%2f/1.0.json",
        "http://127.0.0.1:1/catalog/fake/1.0.json",
        "",
        3,
        None,
    ],
)
@pytest.mark.parametrize("kind", ["card", "sample"])
def test_paths_of_no_gateway_are_refused(
    mirror: Mirror, peers: list[Peer], kind: str, path: object, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "card":
        peers[0].offer(card=path)
    else:
        peers[0].offer(samples=[{"url": path}])
    # Also where a client of HTTP takes the dots away.
    peers[0].rest = b"evil"
    mirror.refresh([peers[0].url])
    assert "cannot be copied" in caplog.text
    assert [file for file in files(mirror) if not file.startswith("gateway/web/catalog/fake/")] == []
    assert all(b"evil" not in one.read_bytes() for one in mirror.settings.folder.rglob("*.json"))


@pytest.mark.parametrize("path", ["/samples/../../evil", "/samples/../fake/evil", "/samples/fake/1.0/.hidden"])
def test_samples_stay_in_their_folder(
    mirror: Mirror, peers: list[Peer], path: str, caplog: pytest.LogCaptureFixture
) -> None:
    peers[0].offer(samples=[{"url": path}])
    peers[0].pages[path] = b"evil"
    mirror.refresh([peers[0].url])
    assert "which is no path of a gateway" in caplog.text
    assert path not in peers[0].seen


@pytest.mark.parametrize(
    "page",
    [
        b"",
        b"[]",
        b"{}",
        b"not JSON",
        b"\xff\xfe",
        b'{"models": 3}',
        b'{"models": [3]}',
        b'{"models": []}',
        b'{"models": [], "limits": 3}',
        b'{"models": [], "limits": {"in_flight": null}}',
        b'{"models": ' + b"[" * 100_000,
    ],
    ids=range(11),
)
def test_a_catalog_of_another_form_leaves_what_is_there(
    mirror: Mirror, peers: list[Peer], page: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    peers[0].offer()
    mirror.refresh([peers[0].url])
    before = files(mirror), catalog(mirror)
    peers[1].pages = {"/catalog.json": page}
    mirror.refresh([peer.url for peer in peers])
    assert f"the catalog of {peers[1].url} cannot be copied" in caplog.text
    assert (files(mirror), catalog(mirror)) == before


def test_a_name_that_no_file_can_have(mirror: Mirror, peers: list[Peer], caplog: pytest.LogCaptureFixture) -> None:
    path = f"/catalog/fake/{'a' * 300}.json"
    peers[0].offer(card=path)
    peers[0].pages[path] = b"{}"
    mirror.refresh([peers[0].url])
    assert "cannot be copied" in caplog.text


def test_what_is_too_large_is_not_kept(
    mirror: Mirror, peers: list[Peer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("serve.gateway.mirror._MOST", 100_000)
    peers[0].offer(content=b" " * 100_001)
    mirror.refresh([peers[0].url])
    assert "/catalog/fake/1.0.json has more than 100000 bytes" in caplog.text
    assert files(mirror) == []


def test_nobody_is_sent_elsewhere(mirror: Mirror, peers: list[Peer], caplog: pytest.LogCaptureFixture) -> None:
    inside = peers[1]
    inside.pages["/secret"] = b"secret"
    peers[0].offer(content=f"{inside.url}/secret".encode())
    mirror.refresh([peers[0].url])
    assert "/catalog/fake/1.0.json is answered 302" in caplog.text
    assert inside.seen == []
