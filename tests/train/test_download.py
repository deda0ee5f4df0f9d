"""Downloads: whole, resumed, verified, unpacked, and refused with a sentence."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import io
import random
import re
import socket
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from host import silent
from tests.conftest import RED
from tests.train.conftest import FileServer, zipped
from train import download
from train.config import compose
from train.data import find_data
from train.download import fetch, hymenoptera
from train.errors import DownloadError, Unavailable
from train.plan import plan
from train.runs import Run, validation_pictures

CONTENT = random.Random(0).randbytes(300_000)
PIECE = 65_536
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def target(tmp_path: Path, server: FileServer) -> Path:
    server.content = CONTENT
    return tmp_path / "cache" / "set.zip"


@pytest.fixture
def cut(server: FileServer, target: Path) -> Path:
    """A part of the file, from a command that gave up."""
    server.cuts = [PIECE, 0, 0, 0]
    with pytest.raises(DownloadError, match=r"broke off after 65536 bytes .*run the same command again"):
        fetch(server.url, target, print, SHA256)
    assert not target.exists()
    server.cuts, server.seen = [], []
    return target.with_name("set.zip.part")


def test_a_whole_file_is_verified_and_nothing_else_is_left(server: FileServer, target: Path) -> None:
    assert fetch(server.url, target, print, SHA256) == target
    assert target.read_bytes() == CONTENT
    assert {path.name for path in target.parent.iterdir()} == {"set.zip", ".set.zip.lock"}


def test_a_cut_download_continues_where_it_broke_off(server: FileServer, target: Path) -> None:
    server.cuts = [2 * PIECE, PIECE]
    fetch(server.url, target, print, SHA256)
    assert target.read_bytes() == CONTENT
    assert server.seen == [None, f"bytes={2 * PIECE}-", f"bytes={3 * PIECE}-"]


def test_a_second_command_continues_the_first(server: FileServer, target: Path, cut: Path) -> None:
    fetch(server.url, target, print, SHA256)
    assert server.seen == [f"bytes={PIECE}-"]
    assert target.read_bytes() == CONTENT


def test_a_file_that_changed_meanwhile_is_fetched_again(server: FileServer, target: Path, cut: Path) -> None:
    server.content, server.etag = CONTENT[::-1], '"two"'
    fetch(server.url, target, print)
    assert target.read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize(
    ("switches", "seen"),
    [
        ({"etag": None}, [None, None]),
        ({"etag": 'W/"one"'}, [None, None]),
        ({"ranges": False}, [None, f"bytes={PIECE}-"]),
        ({"shift": 10}, [None, f"bytes={PIECE}-", None]),
    ],
    ids=["no validator", "weak validator", "ignores ranges", "another range"],
)
def test_nothing_is_appended_that_the_server_does_not_vouch_for(
    server: FileServer, target: Path, switches: dict[str, object], seen: list[str | None]
) -> None:
    vars(server).update(switches, cuts=[PIECE])
    fetch(server.url, target, print, SHA256)
    assert server.seen == seen
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("more", [b"", b"more"])
def test_a_part_that_is_whole_is_taken_and_a_longer_one_thrown_away(
    server: FileServer, target: Path, cut: Path, more: bytes
) -> None:
    cut.write_bytes(CONTENT + more)
    fetch(server.url, target, print, SHA256)
    assert server.seen[0] == f"bytes={len(CONTENT + more)}-"
    assert target.read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused_and_not_kept_and_its_first_digits_are_enough(
    server: FileServer, target: Path
) -> None:
    with pytest.raises(DownloadError, match=rf"has the sha256 {SHA256}, expected {'0' * 64}"):
        fetch(server.url, target, print, "0" * 64)
    assert [path.name for path in target.parent.iterdir()] == [".set.zip.lock"]
    fetch(server.url, target, print, SHA256[:8])
    with pytest.raises(DownloadError, match="expected 01234567"):
        fetch(server.url, target, print, "01234567")


def test_a_missing_file_and_a_closed_port_are_unavailable(server: FileServer, target: Path) -> None:
    server.status = 404
    with pytest.raises(Unavailable, match="answers 404 Not Found"):
        fetch(server.url, target, print)
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


def test_a_name_that_is_not_known_is_looked_up_once(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_silent_until", {})
    monkeypatch.setattr("socket.getaddrinfo", Mock(side_effect=socket.gaierror(-2, "Name or service not known")))
    for why in (r"cannot be reached \(.*Name or service not known", "name.invalid did not answer a moment ago"):
        with pytest.raises(Unavailable, match=why):
            fetch("http://name.invalid/set.zip", target, print)


def test_a_file_over_the_limit_is_not_kept(server: FileServer, target: Path) -> None:
    with pytest.raises(DownloadError, match="larger than the limit of 1000 bytes"):
        fetch(server.url, target, print, max_bytes=1000)
    assert not target.with_name("set.zip.part").exists()


def test_two_processes_do_not_write_the_same_file(server: FileServer, target: Path) -> None:
    target.parent.mkdir(parents=True)
    with target.with_name(".set.zip.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DownloadError, match="another process is downloading"):
            fetch(server.url, target, print)
    assert server.seen == []


@pytest.fixture
def archive(drawn: Path, server: FileServer) -> FileServer:
    """The server holds a zip of the drawn set as .jpg names."""
    names = {path: path.relative_to(drawn).with_suffix(".jpg") for path in drawn.rglob("*.png")}
    server.content = zipped({f"{download.NAME}/{name}": path.read_bytes() for path, name in names.items()})
    return server


def test_the_downloaded_set_is_verified_by_its_pictures(
    archive: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {"BEELINE_DATA_URL": archive.url}
    unknown = r"are not the known 397 of hymenoptera_data .*BEELINE_DATA_SHA256=[0-9a-f]{64}$"
    with pytest.raises(DownloadError, match=unknown):
        find_data(None, silent, cache=tmp_path, environ=environ)
    assert not list(tmp_path.glob("hymenoptera*"))
    zipfile.ZipFile(io.BytesIO(archive.content)).extractall(tmp_path / "copy")
    monkeypatch.setattr(download, "PICTURES_SHA256", download.digest(tmp_path / "copy"))
    found = find_data(None, silent, cache=tmp_path, environ=environ)
    assert (found.name, found.generated, len(found.train), len(found.val)) == ("hymenoptera_data", False, 16, 8)
    archive.seen.clear()
    find_data(None, silent, cache=tmp_path, environ=environ)
    assert archive.seen == [], "a set that is there is not downloaded again"


def test_an_archive_with_a_digest_of_its_own_may_hold_other_pictures(archive: FileServer, tmp_path: Path) -> None:
    with pytest.raises(DownloadError) as caught:
        hymenoptera(tmp_path, silent, {"BEELINE_DATA_URL": archive.url})
    match = re.search(r"BEELINE_DATA_SHA256=(\w+)", str(caught.value))
    assert match
    environ = {"BEELINE_DATA_URL": archive.url, "BEELINE_DATA_SHA256": match[1]}
    assert len(find_data(None, silent, cache=tmp_path, environ=environ).train) == 16
    with pytest.raises(DownloadError, match="expected 000"):
        hymenoptera(tmp_path, silent, {**environ, "BEELINE_DATA_SHA256": "0" * 64})


def test_the_133_breeds_are_downloaded_by_the_experiment_and_found_again(server: FileServer, tmp_path: Path) -> None:
    breeds = [f"{number:03}.Breed_{number}" for number in range(1, 134)]
    names = [f"{half}/{breed}/{n}.jpg" for half in ("train", "valid", "test") for breed in breeds for n in (0, 1)]
    server.content = zipped({f"dogImages/{name}": RED for name in names} | {"__MACOSX/dogImages/._x": b"x"})
    words = ["+experiment=dogs133", "fit=small", f"data.folder='{server.url.replace('set', 'dogImages')}?x=1'"]
    planned = plan(words, silent, tmp_path, environ={})
    assert (planned.data.name, planned.data.labels) == ("dogImages", tuple(breeds))
    assert (len(planned.data.train), len(planned.data.val)) == (266, 266)
    server.status = 404
    assert plan(words, silent, tmp_path, environ={}).fingerprint == planned.fingerprint
    record = {"data": {"name": "dogImages", "generated": False, "digest": planned.data.digest}}
    (tmp_path / "run").mkdir()
    planned.config.save(tmp_path / "run/config.yaml")
    assert validation_pictures(Run(tmp_path / "run", record), tmp_path, {}) == planned.data.val
    with pytest.raises(Unavailable, match=r"other\.zip answers 404"):
        find_data(server.url.replace("set", "other"), silent, cache=tmp_path, environ={})
    assert str(compose(words[:1], environ={}).data.folder).endswith("/dogImages.zip")


def patched(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


# The size of an entry is at offset 22 of its local header; in the directory it is at 24, and the flags are at 8.
DIRECTORY, SMALL = b"PK\x01\x02", struct.pack("<I", 1000)


@pytest.mark.parametrize(
    ("damage", "rules", "sentence"),
    [
        (lambda data: data.replace(b"train", b"../.."), {}, "points outside the folder"),
        (lambda data: patched(patched(data, 22, SMALL), data.index(DIRECTORY) + 24, SMALL), {}, "cannot be unpacked"),
        (lambda data: patched(data, data.index(DIRECTORY) + 8, b"\1"), {}, "'train/0.jpg', which is encrypted"),
        (lambda data: data[: len(data) // 2], {}, "cannot be unpacked .*download it again"),
        (lambda data: patched(data, 60, bytes([data[60] ^ 1])), {}, "cannot be unpacked"),
        (lambda data: b"<html>sign in first</html>", {}, "cannot be unpacked .*download it again"),
        (bytes, {"max_bytes": 1000}, "more than the limit of 1000 bytes"),
        (bytes, {"max_files": 1}, "holds 2 entries; the limit is 1"),
    ],
)
def test_an_unsafe_archive_is_refused_and_does_not_stop_the_next_download(
    server: FileServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[bytes], bytes],
    rules: dict[str, Any],
    sentence: str,
) -> None:
    """What else a zip file may not hold is in tests/archive/test_mar.py, by the same code."""
    monkeypatch.setattr(download, "RULES", dataclasses.replace(download.RULES, **rules))
    server.content = damage(zipped({"train/0.jpg": random.Random(1).randbytes(5_000) + b"\0" * 1_000_000, "b": b""}))
    with pytest.raises(DownloadError, match=sentence):
        hymenoptera(tmp_path / "cache", silent, {"BEELINE_DATA_URL": server.url})
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock"}
