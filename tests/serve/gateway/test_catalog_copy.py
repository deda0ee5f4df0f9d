"""The catalog of a backend on another host is copied, and nothing that does not belong there."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.gateway.catalog_copy import CatalogCopy
from serve.gateway.settings import Name, Settings
from tests.serve.gateway.conftest import Peer
from tests.serve.gateway.test_discovery import wait_for


@pytest.fixture
def peers() -> Iterator[list[Peer]]:
    found = [Peer("127.0.0.2"), Peer("127.0.0.3")]
    yield found
    for peer in found:
        if not peer.stopped.is_set():
            peer.stop()


@pytest.fixture
def copy(tmp_path: Path) -> CatalogCopy:
    folder = tmp_path / "gateway"
    (folder / "web").mkdir(parents=True)
    values: dict[str, Any] = {"folder": folder, "program": "nginx", "version": "1.22.1", "listen": (), "backends": ()}
    numbers = ("max_body", "max_image", "in_flight", "per_second", "deadline", "drain", "stop", "processes")
    values |= dict.fromkeys((*numbers, "log_megabytes", "log_files"), 1)
    name = Name("backends", 8080, 8081)
    return CatalogCopy(Settings(store=None, versions=False, logs=tmp_path, name=name, **values))


def catalog(copy: CatalogCopy) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((copy.settings.web / "catalog.json").read_text())
    return values


def files(copy: CatalogCopy) -> list[str]:
    """Everything below the runtime folder's parent, the document root's own files by their path in it."""
    top = copy.settings.folder.parent
    return sorted(str(path.relative_to(top)) for path in top.rglob("*") if path.is_file())


def test_list_cards_and_samples_are_copied(copy: CatalogCopy, peers: list[Peer]) -> None:
    peers[0].offer(content=b'{"spec": 1}')
    copy.refresh([peer.url for peer in peers[:1]])
    web = copy.settings.web
    assert (web / "catalog/fake/1.0.json").read_bytes() == b'{"spec": 1}'
    assert (web / "samples/fake/1.0/a.png").read_bytes() == b"a picture"
    assert catalog(copy)["gateway"] == {"kind": "nginx", "version": "1.22.1"}
    assert catalog(copy)["limits"]["in_flight"] == 4
    # nginx's workers are nobody.
    assert (web / "samples").stat().st_mode & 0o777 == 0o755
    assert (web / "catalog.json").stat().st_mode & 0o777 == 0o644
    copy.refresh([peer.url for peer in peers[:1]])
    assert peers[0].seen.count("/catalog.json") == 1, "nothing changed and it is not time yet"


def test_cards_are_copied_again_when_it_is_time_and_samples_when_something_changed(
    copy: CatalogCopy, peers: list[Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.gateway.catalog_copy._AGAIN", 0.0)
    peer, sample = peers[0], "/samples/fake/1.0/a.png"
    for card in (b"{}", b"{}", b'{"serving": {}}', b'{"serving": {}}'):
        peer.offer(content=card)
        copy.refresh([peer.url])
        assert (copy.settings.web / "catalog/fake/1.0.json").read_bytes() == card
    assert (peer.seen.count("/catalog/fake/1.0.json"), peer.seen.count(sample)) == (4, 2)


@pytest.mark.parametrize("told_by", ["card", "catalog"])
def test_another_model_of_the_same_name_and_version_has_its_own_pictures(
    copy: CatalogCopy, peers: list[Peer], monkeypatch: pytest.MonkeyPatch, told_by: str
) -> None:
    monkeypatch.setattr("serve.gateway.catalog_copy._AGAIN", 0.0)
    peer, sample = peers[0], "/samples/fake/1.0/a.png"
    peer.offer()
    copy.refresh([peer.url])
    if told_by == "card":
        peer.offer(content=b'{"fingerprint": "another"}')
    else:
        peer.offer(labels=3)
    del peer.pages[sample]
    copy.refresh([peer.url])
    assert (copy.settings.web / sample[1:]).read_bytes() == b"a picture", "it cannot be had now"
    copy._due = 0.0
    peer.pages[sample] = b"another picture"
    copy.refresh([peer.url])
    assert (copy.settings.web / sample[1:]).read_bytes() == b"another picture"


def test_what_the_catalog_names_no_more_is_removed(
    copy: CatalogCopy, peers: list[Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.gateway.catalog_copy._AGAIN", 0.0)
    (copy.settings.web / "index.html").touch()
    peers[0].offer("1.0")
    copy.refresh([peers[0].url])
    assert "gateway/web/samples/fake/1.0/a.png" in files(copy)
    peers[0].offer("2.0")
    copy.refresh([peers[0].url])
    wanted = ["catalog.json", "catalog/fake/2.0.json", "index.html", "samples/fake/2.0/a.png"]
    assert files(copy) == [f"gateway/web/{name}" for name in wanted]
    assert not (copy.settings.web / "samples/fake/1.0").exists()


class Slow(dict[str, bytes]):
    """Pages that nobody gets until it is said."""

    def __init__(self, pages: dict[str, bytes]) -> None:
        super().__init__(pages)
        self.asked = 0
        self.go = threading.Event()

    def get(self, path: str, default: Any = None) -> Any:
        self.asked += 1
        self.go.wait(30)
        return super().get(path, default)


def test_a_backend_that_answers_slowly_holds_up_nobody(copy: CatalogCopy, peers: list[Peer]) -> None:
    peers[0].offer()
    slow = Slow(peers[0].pages)
    peers[0].pages = slow
    members = [peers[0].url]
    begun = time.monotonic()
    for _ in range(3):
        copy.follow(members)
    wait_for(lambda: slow.asked == 1)
    copy.follow(members)
    assert not copy.settled
    slow.go.set()
    wait_for(lambda: copy.settled)
    assert catalog(copy)["models"][0]["version"] == "1.0"
    assert slow.asked == 3, "one copy: the list, a card, a sample"
    assert time.monotonic() - begun < 30
    copy.stop()


def test_readiness_waits_for_a_first_copy_a_while_only(
    copy: CatalogCopy, peers: list[Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.gateway.catalog_copy._FIRST", 0.1)
    peers[0].offer()
    slow = Slow(peers[0].pages)
    peers[0].pages = slow
    copy.follow([peers[0].url])
    wait_for(lambda: copy.settled)
    assert not (copy.settings.web / "catalog.json").exists()
    copy.stop()
    slow.go.set()
    wait_for(lambda: not any(thread.name == "catalog copy" for thread in threading.enumerate()))
    assert files(copy) == [], "what came after the end is not kept"


def test_the_one_that_joined_last_says_what_is_served(
    copy: CatalogCopy, peers: list[Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.gateway.catalog_copy._AGAIN", 0.0)
    old, new = peers
    old.offer("1.0")
    new.offer("2.0")
    copy.refresh([old.url])
    assert catalog(copy)["models"][0]["version"] == "1.0"
    # Again and again, not only when it joins.
    for _ in range(2):
        copy.refresh([old.url, new.url])
        assert catalog(copy)["models"][0]["version"] == "2.0"
        assert catalog(copy)["limits"]["in_flight"] == 8
    copy.refresh([old.url])
    assert catalog(copy)["models"][0]["version"] == "1.0"


def test_where_one_cannot_be_copied_the_next_is(
    copy: CatalogCopy, peers: list[Peer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="catalog")
    good, bad = peers
    good.offer()
    bad.stop()
    copy.refresh([bad.url])
    assert f"the catalog of {bad.url} cannot be copied" in caplog.text
    assert files(copy) == []
    copy.refresh([bad.url])
    assert len(caplog.records) == 1, "it is not time to try again yet"
    copy.refresh([good.url, bad.url])
    assert catalog(copy)["models"][0]["version"] == "1.0"


def test_a_failure_is_tried_with_another_backend(
    copy: CatalogCopy, peers: list[Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = peers
    good.offer()
    bad.stop()
    # It is the first of both, and both joined at once.
    members = [bad.url, good.url]
    copy.refresh(members)
    assert files(copy) == []
    copy._due = 0.0
    copy.refresh(members)
    assert catalog(copy)["models"][0]["version"] == "1.0"


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
    copy: CatalogCopy, peers: list[Peer], kind: str, path: object, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "card":
        peers[0].offer(card=path)
    else:
        peers[0].offer(samples=[{"url": path}])
    # Also where a client of HTTP takes the dots away.
    peers[0].rest = b"evil"
    copy.refresh([peers[0].url])
    assert "cannot be copied" in caplog.text
    assert [file for file in files(copy) if not file.startswith("gateway/web/catalog/fake/")] == []
    assert all(b"evil" not in one.read_bytes() for one in copy.settings.folder.rglob("*.json"))


@pytest.mark.parametrize("path", ["/samples/../../evil", "/samples/../fake/evil", "/samples/fake/1.0/.hidden"])
def test_samples_stay_in_their_folder(
    copy: CatalogCopy, peers: list[Peer], path: str, caplog: pytest.LogCaptureFixture
) -> None:
    peers[0].offer(samples=[{"url": path}])
    peers[0].pages[path] = b"evil"
    copy.refresh([peers[0].url])
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
    copy: CatalogCopy, peers: list[Peer], page: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    peers[0].offer()
    copy.refresh([peers[0].url])
    before = files(copy), catalog(copy)
    peers[1].pages = {"/catalog.json": page}
    copy.refresh([peer.url for peer in peers])
    assert f"the catalog of {peers[1].url} cannot be copied" in caplog.text
    assert (files(copy), catalog(copy)) == before


def test_a_name_that_no_file_can_have(copy: CatalogCopy, peers: list[Peer], caplog: pytest.LogCaptureFixture) -> None:
    path = f"/catalog/fake/{'a' * 300}.json"
    peers[0].offer(card=path)
    peers[0].pages[path] = b"{}"
    copy.refresh([peers[0].url])
    assert "cannot be copied" in caplog.text


def test_what_is_too_large_is_not_kept(
    copy: CatalogCopy, peers: list[Peer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("serve.gateway.catalog_copy._MOST", 100_000)
    peers[0].offer(content=b" " * 100_001)
    copy.refresh([peers[0].url])
    assert "/catalog/fake/1.0.json has more than 100000 bytes" in caplog.text
    assert files(copy) == []


def test_nobody_is_sent_elsewhere(copy: CatalogCopy, peers: list[Peer], caplog: pytest.LogCaptureFixture) -> None:
    inside = peers[1]
    inside.pages["/secret"] = b"secret"
    peers[0].offer(content=f"{inside.url}/secret".encode())
    copy.refresh([peers[0].url])
    assert "/catalog/fake/1.0.json is answered 302" in caplog.text
    assert inside.seen == []
