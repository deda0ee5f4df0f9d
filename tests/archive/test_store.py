"""The store: its index, its states, and builds at the same time."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from archive.digest import file_sha256
from archive.store import INDEX, Entry, expected_sha256, listing, put, read_index
from beeline.errors import ArchiveError


def place(store: Path, name: str, data: bytes) -> Entry:
    draft = store / f".{name}.draft"
    draft.write_bytes(data)
    entry = Entry(file_sha256(draft), name, "1.0", "f" * 64, len(data))
    put(store, draft, f"{name}.mar", entry)
    return entry


def test_what_is_put_is_listed_and_readable_by_others(tmp_path: Path) -> None:
    entry = place(tmp_path, "ants", b"model")
    assert read_index(tmp_path) == {"ants.mar": entry}
    assert json.loads((tmp_path / INDEX).read_text())["schema"] == 1
    assert (tmp_path / "ants.mar").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / INDEX).stat().st_mode & 0o777 == 0o644
    assert expected_sha256(tmp_path / "ants.mar") == entry.sha256
    assert expected_sha256(tmp_path / "bees.mar") is None


def test_builds_at_the_same_time_lose_no_entry(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: place(tmp_path, f"model{i}", bytes([i])), range(24)))
    assert len(read_index(tmp_path)) == 24
    assert {item.state for item in listing(tmp_path)} == {"ok"}


def test_each_state_is_said_with_its_reason(tmp_path: Path) -> None:
    for name in ("changed", "missing", "ok"):
        place(tmp_path, name, name.encode())
    (tmp_path / "changed.mar").write_bytes(b"other")
    (tmp_path / "missing.mar").unlink()
    (tmp_path / "unlisted.mar").write_bytes(b"from elsewhere")
    found = {item.file: item for item in listing(tmp_path)}
    assert {file: item.state for file, item in found.items()} == {
        f"{state}.mar": state for state in ("changed", "missing", "ok", "unlisted")
    }
    assert found["changed.mar"].reason.startswith(
        f"sha256 {file_sha256(tmp_path / 'changed.mar')[:12]}, the index says"
    )
    assert found["unlisted.mar"].entry is None


def test_an_empty_store_is_empty_and_a_missing_one_is_said(tmp_path: Path) -> None:
    assert listing(tmp_path) == []
    with pytest.raises(ArchiveError, match="is missing"):
        listing(tmp_path / "none")


@pytest.mark.parametrize(
    "text", ["{", '{"schema": 2, "archives": {}}', '{"schema": 1}', '{"schema": 1, "archives": {"a": {}}}']
)
def test_an_index_that_cannot_be_read_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ArchiveError, match=r"index\.json cannot be read"):
        read_index(tmp_path)
