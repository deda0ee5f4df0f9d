"""The store: its index, its states, builds at the same time, and which archives are served or refused."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from archive.build import build
from archive.mar import Golden
from archive.store import INDEX, Entry, expected_sha256, find_archives, listing, locate, put, read_index
from beeline.errors import ArchiveError
from host.files import sha256

MakeArchive = Callable[..., Path]


def place(store: Path, name: str, data: bytes) -> Entry:
    draft = store / f".{name}.draft"
    draft.write_bytes(data)
    entry = Entry(sha256(draft), name, "1.0", "f" * 64, len(data))
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
        f"has sha256 {sha256(tmp_path / 'changed.mar')[:12]}, index.json says"
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


def test_every_archive_of_a_store_in_order(tmp_path: Path, make_fake: MakeArchive) -> None:
    make_fake(tmp_path, "pears")
    make_fake(tmp_path, "apples", expected="red")
    found = find_archives(tmp_path)
    assert [archive.model for archive in found] == ["apples", "pears"]
    assert [archive.golden for archive in found] == [Golden("golden/0.png", "red"), None]
    assert found[0].golden_bytes() == b"no picture"


def test_archives_are_named_by_model_file_or_path(tmp_path: Path, make_fake: MakeArchive) -> None:
    path = make_fake(tmp_path / "store")
    elsewhere = make_fake(tmp_path / "elsewhere", "other")
    assert find_archives(tmp_path / "store", ["fake"])[0].path == path
    assert find_archives(tmp_path / "store", ["fake.mar"])[0].path == path
    assert find_archives(tmp_path / "store", [str(elsewhere)])[0].model == "other"


def test_an_empty_store_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"holds no archive; build one with `beeline archive build`"):
        find_archives(tmp_path)


def test_a_missing_archive_suggests_the_nearest(tmp_path: Path, make_fake: MakeArchive) -> None:
    make_fake(tmp_path)
    with pytest.raises(ArchiveError, match=r"faek\.mar is missing; did you mean 'fake'\?"):
        find_archives(tmp_path, ["faek"])


def test_an_archive_that_differs_from_the_index_is_refused(tmp_path: Path, make_fake: MakeArchive) -> None:
    path = make_fake(tmp_path)
    digest = sha256(path)
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"schema": 1, "archives": {"fake.mar": {"sha256": digest}}}))
    assert find_archives(tmp_path)[0].path == path
    make_fake(tmp_path, label="green")
    with pytest.raises(ArchiveError, match=rf"index\.json says {digest[:12]}; it was changed after it was built"):
        find_archives(tmp_path)


def test_an_archive_that_the_index_does_not_list_is_served(tmp_path: Path, make_fake: MakeArchive) -> None:
    make_fake(tmp_path)
    (tmp_path / "index.json").write_text('{"schema": 1, "archives": {}}')
    assert len(find_archives(tmp_path)) == 1


@pytest.mark.parametrize("data", [b"", b"not a zip", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_archive_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "fake.mar").write_bytes(data)
    with pytest.raises(ArchiveError, match="cannot be read as a model archive"):
        find_archives(tmp_path)


def test_two_archives_of_one_model_and_version_are_refused(tmp_path: Path, make_fake: MakeArchive) -> None:
    make_fake(tmp_path).rename(tmp_path / "copy.mar")
    make_fake(tmp_path)
    with pytest.raises(ArchiveError, match=r"are both fake 1\.0; name one with --model"):
        find_archives(tmp_path)


def test_a_file_that_the_archives_own_record_does_not_know(tmp_path: Path, colour_model: Path) -> None:
    path = build(colour_model, tmp_path / "built").path
    brought = tmp_path / "elsewhere" / path.name
    brought.parent.mkdir()
    shutil.copyfile(path, brought)
    assert len(find_archives(tmp_path, (str(brought),))) == 1
    with zipfile.ZipFile(brought, "a") as archive:
        archive.writestr("torch.py", "raise SystemExit(3)")
    with pytest.raises(ArchiveError, match=r"holds torch\.py, which checksums\.json does not list"):
        find_archives(tmp_path, (str(brought),))


def test_only_what_the_index_lists(tmp_path: Path, make_fake: MakeArchive) -> None:
    path = make_fake(tmp_path)
    index = tmp_path / "index.json"
    refused = r"fake\.mar is not in the index\.json of its folder, and only archives that it lists with their sha256"
    with pytest.raises(ArchiveError, match=refused):
        find_archives(tmp_path, listed=True)
    others: list[dict[str, object]] = [{}, {"fake.mar": {}}, {"fake.mar": {"sha256": None}}]
    for archives in (*others, {"other.mar": {"sha256": sha256(path)}}):
        index.write_text(json.dumps({"schema": 1, "archives": archives}))
        with pytest.raises(ArchiveError, match=refused):
            find_archives(tmp_path, listed=True)
        with pytest.raises(ArchiveError, match=refused):
            find_archives(tmp_path, [str(path)], listed=True)
    listing = {"fake.mar": {"sha256": sha256(path)}}
    index.write_text(json.dumps({"schema": 1, "archives": listing}))
    assert [archive.path for archive in find_archives(tmp_path, listed=True)] == [path]
    make_fake(tmp_path, "stranger")
    with pytest.raises(ArchiveError, match=r"stranger\.mar is not in the index\.json"):
        find_archives(tmp_path, listed=True)
    assert len(find_archives(tmp_path, ["fake"], listed=True)) == 1


def test_what_is_listed_must_be_as_it_is_listed(tmp_path: Path, make_fake: MakeArchive) -> None:
    make_fake(tmp_path)
    index = tmp_path / "index.json"
    wrongs: list[object] = ["0" * 64, "", 5, ["a"], {}]
    for wrong in wrongs:
        index.write_text(json.dumps({"schema": 1, "archives": {"fake.mar": {"sha256": wrong}}}))
        with pytest.raises(ArchiveError, match=r"was changed after it was built"):
            find_archives(tmp_path, listed=True)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"archives": 3}', '{"archives": {"fake.mar": 3}}', "[" * 100_000])
def test_an_index_of_another_form_lists_nothing(tmp_path: Path, make_fake: MakeArchive, text: str) -> None:
    make_fake(tmp_path)
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ArchiveError, match=r"index\.json cannot be read"):
        find_archives(tmp_path, listed=True)


def encrypt(data: bytearray) -> None:
    """Say of every member, here and in the directory, that it is encrypted."""
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.find(signature)
        while at >= 0:
            data[at + offset] |= 1
            at = data.find(signature, at + 4)


def overturn(data: bytearray) -> None:
    """Change what the first member holds."""
    start = 30 + data[26] + 256 * data[27]
    data[start : start + 8] = b"\xff" * 8


@pytest.mark.parametrize("break_it", [encrypt, overturn])
@pytest.mark.parametrize("member", ["MAR-INF/MANIFEST.json", "checksums.json"])
def test_an_archive_that_is_broken_inside(
    tmp_path: Path, make_fake: MakeArchive, break_it: Callable[[bytearray], None], member: str
) -> None:
    path = make_fake(tmp_path)
    with zipfile.ZipFile(path) as archive:
        files = {"checksums.json": b'{"files": {}}', **{name: archive.read(name) for name in archive.namelist()}}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        # First, where it is broken.
        for name in sorted(files, key=lambda name: name != member):
            archive.writestr(name, files[name])
    data = bytearray(path.read_bytes())
    break_it(data)
    path.write_bytes(data)
    with pytest.raises(ArchiveError, match=r"fake\.mar cannot be (read as a model archive|checked) \("):
        find_archives(tmp_path)


def test_a_path_wins_over_the_stores_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "store"
    store.mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("ants.mar", "bees.mar"):
        (store / name).touch()
    Path("bees.mar").touch()
    assert locate(Path("ants"), store) == locate(Path("ants.mar"), store) == store / "ants.mar"
    assert locate(Path("bees.mar"), store) == Path("bees.mar")
    assert locate(Path("other/ants.mar"), store) == Path("other/ants.mar")
    assert locate(Path("none"), store) == Path("none")
