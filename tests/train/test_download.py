"""Downloads: whole, resumed, verified, and refused with a sentence."""

from __future__ import annotations

import fcntl
import hashlib
import random
import time
from pathlib import Path
from typing import Any

import pytest

from train import download
from train.download import fetch
from train.errors import DownloadError, Unavailable

CONTENT = random.Random(0).randbytes(300_000)
PIECE = 65_536
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def target(tmp_path: Path, server: Any) -> Path:
    server.content = CONTENT
    return tmp_path / "cache" / "set.zip"


def test_a_whole_file_is_verified_and_nothing_else_is_left(server: Any, target: Path) -> None:
    assert fetch(server.url, target, print, SHA256) == target
    assert target.read_bytes() == CONTENT
    assert {path.name for path in target.parent.iterdir()} == {"set.zip", ".set.zip.lock"}


def test_a_cut_download_continues_where_it_broke_off(server: Any, target: Path) -> None:
    server.cuts = [2 * PIECE, PIECE]
    fetch(server.url, target, print, SHA256)
    assert target.read_bytes() == CONTENT
    assert server.seen == [None, f"bytes={2 * PIECE}-", f"bytes={3 * PIECE}-"]


def test_a_second_command_continues_the_first(server: Any, target: Path) -> None:
    server.cuts = [PIECE, 0, 0, 0]
    with pytest.raises(DownloadError, match=r"broke off after 65536 bytes .*run the same command again"):
        fetch(server.url, target, print, SHA256)
    assert not target.exists()
    server.cuts, server.seen = [], []
    fetch(server.url, target, print, SHA256)
    assert server.seen == [f"bytes={PIECE}-"]
    assert target.read_bytes() == CONTENT


def test_a_file_that_changed_meanwhile_is_fetched_anew(server: Any, target: Path) -> None:
    server.cuts = [PIECE, 0, 0, 0]
    with pytest.raises(DownloadError):
        fetch(server.url, target, print)
    server.content, server.etag = CONTENT[::-1], '"two"'
    fetch(server.url, target, print)
    assert target.read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("etag", [None, 'W/"one"'])
def test_without_a_strong_validator_nothing_is_appended(server: Any, target: Path, etag: str | None) -> None:
    server.etag, server.cuts = etag, [PIECE]
    fetch(server.url, target, print, SHA256)
    assert server.seen == [None, None]


def test_a_server_that_ignores_ranges_starts_anew(server: Any, target: Path) -> None:
    server.ranges, server.cuts = False, [PIECE]
    fetch(server.url, target, print, SHA256)
    assert server.seen == [None, f"bytes={PIECE}-"]
    assert target.read_bytes() == CONTENT


def test_a_server_that_sends_another_range_starts_anew(server: Any, target: Path) -> None:
    server.shift, server.cuts = 10, [PIECE]
    fetch(server.url, target, print, SHA256)
    assert server.seen == [None, f"bytes={PIECE}-", None]
    assert target.read_bytes() == CONTENT


def test_a_part_that_is_already_whole_is_taken(server: Any, target: Path) -> None:
    server.cuts = [4 * PIECE, 0, 0, 0]
    with pytest.raises(DownloadError):
        fetch(server.url, target, print, SHA256)
    part = target.with_name("set.zip.part")
    part.write_bytes(CONTENT)
    server.cuts = []
    fetch(server.url, target, print, SHA256)
    assert server.seen[-1] == f"bytes={len(CONTENT)}-"
    assert target.read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_thrown_away(server: Any, target: Path) -> None:
    server.cuts = [PIECE, 0, 0, 0]
    with pytest.raises(DownloadError):
        fetch(server.url, target, print, SHA256)
    target.with_name("set.zip.part").write_bytes(CONTENT + b"more")
    server.cuts = []
    fetch(server.url, target, print, SHA256)
    assert target.read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused_and_not_kept(server: Any, target: Path) -> None:
    with pytest.raises(DownloadError, match=rf"has the sha256 {SHA256}, expected {'0' * 64}"):
        fetch(server.url, target, print, "0" * 64)
    assert [path.name for path in target.parent.iterdir()] == [".set.zip.lock"]


def test_the_first_digits_of_a_checksum_are_enough(server: Any, target: Path) -> None:
    fetch(server.url, target, print, SHA256[:8])
    with pytest.raises(DownloadError, match="expected 01234567"):
        fetch(server.url, target, print, "01234567")


def test_a_missing_file_is_unavailable(server: Any, target: Path) -> None:
    server.status = 404
    with pytest.raises(Unavailable, match="answers 404 Not Found"):
        fetch(server.url, target, print)


def test_a_closed_port_is_unavailable(server: Any, target: Path) -> None:
    with pytest.raises(Unavailable, match=r"http://127.0.0.1:1/set.zip cannot be reached \(.*[Cc]onnection refused"):
        fetch("http://127.0.0.1:1/set.zip", target, print)


def test_a_server_that_never_answers_is_given_up(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "REACH_SECONDS", 0.05)
    monkeypatch.setattr("train.download.requests.get", lambda *_, **__: time.sleep(1))
    monkeypatch.setattr(download, "_silent_until", {})
    with pytest.raises(Unavailable, match="no answer in"):
        fetch("http://127.0.0.1:1/set.zip", target, print)
    monkeypatch.setattr("train.download.requests.get", lambda *_, **__: pytest.fail("asked a second time"))
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1 did not answer a moment ago"):
        fetch("http://127.0.0.1:1/weights.pth", target, print)


def test_a_file_over_the_limit_is_not_kept(server: Any, target: Path) -> None:
    with pytest.raises(DownloadError, match="larger than the limit of 1000 bytes"):
        fetch(server.url, target, print, max_bytes=1000)
    assert not target.with_name("set.zip.part").exists()


def test_two_processes_do_not_write_the_same_file(server: Any, target: Path) -> None:
    target.parent.mkdir(parents=True)
    with target.with_name(".set.zip.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DownloadError, match="another process is downloading"):
            fetch(server.url, target, print)
    assert server.seen == []
