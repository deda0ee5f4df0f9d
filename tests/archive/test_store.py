"""The store: its index, its states, builds at the same time, and which archives are served or refused."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from archive.mar import Golden
from archive.store import INDEX, Entry, expected_sha256, file_of, find_archives, listing, locate, put, read_index
from beeline.errors import ArchiveError
from host.files import sha256

MakeArchive = Callable[..., Path]


def place(store: Path, name: str, data: bytes, version: str = "1.0", default: bool = False) -> Entry:
    draft = store / f".{name}.draft"
    draft.write_bytes(data)
    entry = Entry(sha256(draft), name, version, "f" * 64, len(data))
    put(store, draft, entry, default)
    return entry


def write_index(store: Path, **digests: object) -> None:
    # None is an entry without a sha256.
    archives = {f"{name}.mar": {} if digest is None else {"sha256": digest} for name, digest in digests.items()}
    (store / INDEX).write_text(json.dumps({"schema": 1, "archives": archives}))


def test_put_lists_an_archive_that_others_can_read(tmp_path: Path) -> None:
    entry = place(tmp_path, "ants", b"model")
    assert read_index(tmp_path) == {"ants.mar": entry}
    assert json.loads((tmp_path / INDEX).read_text())["schema"] == 1
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("ants.mar", INDEX)} == {0o644}
    assert expected_sha256(tmp_path / "ants.mar") == entry.sha256
    assert expected_sha256(tmp_path / "bees.mar") is None


def versions(store: Path) -> dict[str, tuple[str, bool]]:
    return {file: (entry.version, entry.default) for file, entry in read_index(store).items()}


def test_a_second_version_gets_a_file_of_its_own_and_the_first_stays_the_default(tmp_path: Path) -> None:
    for version in ("1.0", "2.0", "3.0"):
        place(tmp_path, "ants", version.encode(), version)
    named = {"ants.mar": "1.0", "ants-2.0.mar": "2.0", "ants-3.0.mar": "3.0"}
    assert versions(tmp_path) == {file: (version, version == "1.0") for file, version in named.items()}
    assert {file: (tmp_path / file).read_text() for file in named} == named
    # Each is built again into its own file, and stays what it is.
    place(tmp_path, "ants", b"newer", "2.0", default=True)
    place(tmp_path, "ants", b"newest", "1.0")
    assert versions(tmp_path) == {file: (version, version == "2.0") for file, version in named.items()}
    assert {file: (tmp_path / file).read_text() for file in named} == {
        **named, "ants-2.0.mar": "newer", "ants.mar": "newest"
    }  # fmt: skip


def test_nothing_is_overwritten_by_another_version_or_model(tmp_path: Path, make_fake: MakeArchive) -> None:
    # The index lists none of these.
    first, other = make_fake(tmp_path, "ants"), make_fake(tmp_path, "ants-2.0")
    assert file_of(tmp_path, "ants", "1.0") == "ants.mar"
    before = first.read_bytes(), other.read_bytes()
    place(tmp_path, "ants", b"newer", "3.0")
    assert versions(tmp_path) == {"ants-3.0.mar": ("3.0", True)}
    with pytest.raises(ArchiveError, match=r"ants-2\.0\.mar is ants-2\.0 1\.0; give ants 2\.0 another --name"):
        place(tmp_path, "ants", b"newer", "2.0")
    assert (first.read_bytes(), other.read_bytes()) == before


def test_the_first_version_is_served_first_and_the_default_is_the_indexs(
    tmp_path: Path, make_fake: MakeArchive
) -> None:
    for version in ("0.9", "1.0"):
        make_fake(tmp_path, version=version)
    assert [(each.version, each.default) for each in find_archives(tmp_path)] == [("1.0", True), ("0.9", True)]
    digest = sha256(tmp_path / "fake.mar")
    (tmp_path / INDEX).write_text(
        json.dumps({"schema": 1, "archives": {"fake.mar": {"sha256": digest, "default": False}}})
    )
    assert [(each.version, each.default) for each in find_archives(tmp_path)] == [("1.0", False), ("0.9", True)]


def test_builds_at_the_same_time_lose_no_entry(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: place(tmp_path, f"model{i}", bytes([i])), range(24)))
    assert len(read_index(tmp_path)) == 24
    assert {item.state for item in listing(tmp_path)} == {"ok"}


def test_the_listing_gives_each_state_with_its_reason(tmp_path: Path) -> None:
    assert listing(tmp_path) == []
    for name in ("changed", "missing", "ok"):
        place(tmp_path, name, name.encode())
    (tmp_path / "changed.mar").write_bytes(b"other")
    (tmp_path / "missing.mar").unlink()
    (tmp_path / "unlisted.mar").write_bytes(b"from elsewhere")
    items = {item.file: item for item in listing(tmp_path)}
    states = ("changed", "missing", "ok", "unlisted")
    assert {file: item.state for file, item in items.items()} == {f"{state}.mar": state for state in states}
    digest = sha256(tmp_path / "changed.mar")[:12]
    assert items["changed.mar"].reason.startswith(f"has sha256 {digest}, index.json says")
    assert items["unlisted.mar"].entry is None
    with pytest.raises(ArchiveError, match="is missing"):
        listing(tmp_path / "none")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"schema": 2, "archives": {}}', '{"schema": 1, "archives": 3}', "[" * 99_999]
)
def test_an_index_that_cannot_be_read_is_one_sentence(tmp_path: Path, make_fake: MakeArchive, text: str) -> None:
    make_fake(tmp_path)
    (tmp_path / INDEX).write_text(text)
    for use in (read_index, find_archives):
        with pytest.raises(ArchiveError, match=r"index\.json cannot be read"):
            use(tmp_path)
    write_index(tmp_path, ants=None)
    with pytest.raises(ArchiveError, match=r"index\.json cannot be read .*missing 5 required"):
        read_index(tmp_path)


def test_every_archive_of_a_store_in_order(tmp_path: Path, make_fake: MakeArchive) -> None:
    make_fake(tmp_path, "pears")
    make_fake(tmp_path, "apples", expected="red")
    archives = find_archives(tmp_path)
    assert [archive.model for archive in archives] == ["apples", "pears"]
    assert [archive.golden for archive in archives] == [Golden("golden/0.png", "red"), None]
    assert archives[0].golden_bytes() == b"no picture"


def test_archives_are_named_by_model_file_or_path(
    tmp_path: Path, make_fake: MakeArchive, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_fake(tmp_path / "store")
    elsewhere = make_fake(tmp_path / "elsewhere", "other")
    monkeypatch.chdir(elsewhere.parent)
    assert [archive.path for archive in find_archives(path.parent, ["fake", "fake.mar"])] == [path]
    assert [archive.model for archive in find_archives(path.parent, ["./other.mar"])] == ["other"]
    with pytest.raises(ArchiveError, match=r"faek\.mar is missing; did you mean 'fake'\?"):
        find_archives(path.parent, ["faek"])


@pytest.mark.parametrize("data", [b"", b"not a zip", b"PK\x05\x06" + bytes(18)])
def test_a_store_without_a_real_archive_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ArchiveError, match=r"holds no archive; build one with `beeline archive build`"):
        find_archives(tmp_path)
    (tmp_path / "fake.mar").write_bytes(data)
    with pytest.raises(ArchiveError, match="cannot be read as a model archive"):
        find_archives(tmp_path)


def test_two_archives_of_one_model_and_version_are_refused(tmp_path: Path, make_fake: MakeArchive) -> None:
    make_fake(tmp_path).rename(tmp_path / "copy.mar")
    make_fake(tmp_path)
    with pytest.raises(ArchiveError, match=r"are both fake 1\.0; name one with --model"):
        find_archives(tmp_path)


def test_a_file_that_the_archives_checksums_do_not_list_is_refused(tmp_path: Path, colour_archive: Path) -> None:
    copy = shutil.copyfile(colour_archive, tmp_path / "colours.mar")
    assert len(find_archives(tmp_path, (str(copy),))) == 1
    with zipfile.ZipFile(copy, "a") as archive:
        archive.writestr("torch.py", "raise SystemExit(3)")
    with pytest.raises(ArchiveError, match=r"holds torch\.py, which checksums\.json does not list"):
        find_archives(tmp_path, (str(copy),))


@pytest.mark.parametrize("digests", [None, {}, {"fake": None}, {"other": "0" * 64}])
def test_an_archive_that_the_index_does_not_list_is_served_unless_it_must_be_listed(
    tmp_path: Path, make_fake: MakeArchive, digests: dict[str, object] | None
) -> None:
    path = make_fake(tmp_path)
    if digests is not None:
        write_index(tmp_path, **digests)
    assert [archive.path for archive in find_archives(tmp_path)] == [path]
    for wanted in ([], [str(path)]):
        with pytest.raises(ArchiveError, match=r"fake\.mar is not in the index\.json of its folder, and only archives"):
            find_archives(tmp_path, wanted, listed=True)
    write_index(tmp_path, fake=sha256(path))
    assert [archive.path for archive in find_archives(tmp_path, listed=True)] == [path]


@pytest.mark.parametrize("digest", ["0" * 64, "", 5, ["a"], {}])
def test_an_archive_that_differs_from_the_index_is_refused(
    tmp_path: Path, make_fake: MakeArchive, digest: object
) -> None:
    make_fake(tmp_path)
    write_index(tmp_path, fake=digest)
    for listed in (False, True):
        with pytest.raises(ArchiveError, match=r"index\.json says .*; it was changed after it was built"):
            find_archives(tmp_path, listed=listed)


def encrypt(data: bytearray) -> None:
    """Mark every member as encrypted, in its header and in the directory."""
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.find(signature)
        while at >= 0:
            data[at + offset] |= 1
            at = data.find(signature, at + 4)


def corrupt(data: bytearray) -> None:
    """Change the content of the first member."""
    start = 30 + data[26] + 256 * data[27]
    data[start : start + 8] = b"\xff" * 8


@pytest.mark.parametrize("damage", [encrypt, corrupt])
@pytest.mark.parametrize("member", ["MAR-INF/MANIFEST.json", "checksums.json"])
def test_an_archive_that_is_damaged_inside_is_refused(
    tmp_path: Path, make_fake: MakeArchive, damage: Callable[[bytearray], None], member: str
) -> None:
    path = make_fake(tmp_path)
    with zipfile.ZipFile(path) as archive:
        files = {"checksums.json": b'{"files": {}}', **{name: archive.read(name) for name in archive.namelist()}}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        # The damaged member is the first one.
        for name in sorted(files, key=lambda name: name != member):
            archive.writestr(name, files[name])
    data = bytearray(path.read_bytes())
    damage(data)
    path.write_bytes(data)
    with pytest.raises(ArchiveError, match=r"fake\.mar cannot be (read as a model archive|checked) \("):
        find_archives(tmp_path)


def test_a_path_wins_over_the_stores_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "store"
    store.mkdir()
    monkeypatch.chdir(tmp_path)
    for path in (store / "ants.mar", store / "bees.mar", Path("bees.mar")):
        path.touch()
    assert locate(Path("ants"), store) == locate(Path("ants.mar"), store) == store / "ants.mar"
    for given in (Path("bees.mar"), Path("other/ants.mar"), Path("none")):
        assert locate(given, store) == given
