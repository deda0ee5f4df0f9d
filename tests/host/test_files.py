"""Digests, files that are whole for every reader, and locks between processes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from host import files


@contextmanager
def held_elsewhere(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Hold the lock file in another process."""
    path.touch()
    command = ["flock", "--no-fork", str(path), "sh", "-c", "echo; exec cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def test_a_digest_is_over_all_pieces_of_a_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 9000
    (tmp_path / "file").write_bytes(data)
    assert files.sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_json_is_whole_indented_has_the_mode_and_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "values.json"
    path.write_text("old")
    files.write_json(path, {"name": "Bücher"}, mode=0o640, sync=True)
    assert path.read_text(encoding="utf-8") == '{\n  "name": "Bücher"\n}\n'
    assert path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(tmp_path / "other", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fails", ["replace", "chmod"])
def test_a_write_that_fails_leaves_the_old_file_and_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, fails, fail)
    with pytest.raises(OSError, match="No space"):
        files.write_whole(path, "new", mode=0o644)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_only_a_synchronous_write_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(Path(f"/proc/self/fd/{descriptor}").readlink()))
    files.write_whole(tmp_path / "file", "fast")
    assert synced == []
    files.write_whole(tmp_path / "file", "safe", sync=True)
    (draft,) = synced
    assert draft.name.startswith(".file-")


def test_a_lock_waits_for_its_holder(tmp_path: Path) -> None:
    taken = threading.Event()

    def take() -> None:
        with files.locked(tmp_path / "lock"):
            taken.set()

    with held_elsewhere(tmp_path / "lock") as holder:
        waiting = threading.Thread(target=take)
        waiting.start()
        assert not taken.wait(0.2)
        holder.kill()
        assert taken.wait(10)
        waiting.join()


def test_try_lock_does_not_wait(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not files.is_locked(path)
    with held_elsewhere(path):
        assert files.try_lock(path) is None
        assert files.is_locked(path)
    assert not files.is_locked(path)
    descriptor = files.try_lock(path)
    assert descriptor is not None
    assert files.is_locked(path)
    os.close(descriptor)
    assert not files.is_locked(path)


def test_a_process_that_inherits_a_lock_holds_it(tmp_path: Path) -> None:
    descriptor = files.try_lock(tmp_path / "lock", 0o600)
    assert descriptor is not None
    assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[descriptor]) as heir:
        os.close(descriptor)
        assert files.is_locked(tmp_path / "lock")
        heir.kill()
    assert not files.is_locked(tmp_path / "lock")


def test_a_folder_is_replaced_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "inside" / "set"
    for name in ("old", "new"):
        with files.whole_folder(target) as fresh:
            (fresh / name).write_text(name)
        assert [path.name for path in target.iterdir()] == [name]
    with pytest.raises(ValueError, match="4 bytes"), files.whole_folder(target) as fresh:
        raise ValueError(f"{(fresh / 'half').write_text('half')} bytes")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(target.parent.iterdir()) == [target]


def test_pictures_are_found_by_name_or_first_bytes_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    names = ["a.jfif", "b.gif", "deep/c.JPG", "deep/link.png", "nameless"]
    (tmp_path / "deep").mkdir()
    for name in set(names) - {"deep/link.png"}:
        (tmp_path / name).write_bytes(b"GIF89a")
    (tmp_path / "deep/link.png").symlink_to(tmp_path / "nowhere")
    for name in (".hidden/d.jpg", "@eaDir/d.jpg", "__MACOSX/._d.jpg", "._a.jfif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"GIF89a")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "deep/up").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    said: list[str] = []
    assert [str(path.relative_to(tmp_path)) for path in files.find_pictures([tmp_path], said.append)] == names
    assert said[0].startswith(f"{tmp_path}: left out, hidden or no pictures: {tmp_path}/._a.jfif, {tmp_path}/.hidden, ")
    assert said[0].endswith(" and 4 more")
