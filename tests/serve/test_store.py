"""Which archives are served, and which are refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from archive.build import build
from beeline.errors import ArchiveError
from serve.store import Canary, find

MakeArchive = Callable[..., Path]


def test_every_archive_of_a_store_in_order(tmp_path: Path, make_fake: MakeArchive) -> None:
    make_fake(tmp_path, "pears")
    make_fake(tmp_path, "apples", expected="red")
    found = find(tmp_path)
    assert [archive.model for archive in found] == ["apples", "pears"]
    assert [archive.canary for archive in found] == [Canary("golden/0.png", "red"), None]
    assert found[0].canary_bytes() == b"no picture"


def test_archives_are_named_by_model_file_or_path(tmp_path: Path, make_fake: MakeArchive) -> None:
    path = make_fake(tmp_path / "store")
    elsewhere = make_fake(tmp_path / "elsewhere", "other")
    assert find(tmp_path / "store", ["fake"])[0].path == path
    assert find(tmp_path / "store", ["fake.mar"])[0].path == path
    assert find(tmp_path / "store", [str(elsewhere)])[0].model == "other"


def test_an_empty_store_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"holds no archive; build one with `beeline archive build`"):
        find(tmp_path)


def test_a_missing_archive_suggests_the_nearest(tmp_path: Path, make_fake: MakeArchive) -> None:
    make_fake(tmp_path)
    with pytest.raises(ArchiveError, match=r"faek\.mar is missing; did you mean 'fake'\?"):
        find(tmp_path, ["faek"])


def test_an_archive_that_differs_from_the_index_is_refused(tmp_path: Path, make_fake: MakeArchive) -> None:
    path = make_fake(tmp_path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"schema": 1, "archives": {"fake.mar": {"sha256": digest}}}))
    assert find(tmp_path)[0].path == path
    make_fake(tmp_path, label="green")
    with pytest.raises(ArchiveError, match=rf"index\.json says {digest[:12]}; it was changed after it was built"):
        find(tmp_path)


def test_an_archive_that_the_index_does_not_list_is_served(tmp_path: Path, make_fake: MakeArchive) -> None:
    make_fake(tmp_path)
    (tmp_path / "index.json").write_text('{"schema": 1, "archives": {}}')
    assert len(find(tmp_path)) == 1


@pytest.mark.parametrize("data", [b"", b"not a zip", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_archive_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "fake.mar").write_bytes(data)
    with pytest.raises(ArchiveError, match="cannot be read as a model archive"):
        find(tmp_path)


def test_two_archives_of_one_model_and_version_are_refused(tmp_path: Path, make_fake: MakeArchive) -> None:
    make_fake(tmp_path).rename(tmp_path / "copy.mar")
    make_fake(tmp_path)
    with pytest.raises(ArchiveError, match=r"are both fake 1\.0; name one with --model"):
        find(tmp_path)


def test_a_file_that_the_archives_own_record_does_not_know(tmp_path: Path, colour_model: Path) -> None:
    path = build(colour_model, tmp_path / "built").path
    brought = tmp_path / "elsewhere" / path.name
    brought.parent.mkdir()
    shutil.copyfile(path, brought)
    assert len(find(tmp_path, (str(brought),))) == 1
    with zipfile.ZipFile(brought, "a") as archive:
        archive.writestr("torch.py", "raise SystemExit(3)")
    with pytest.raises(ArchiveError, match=r"holds torch\.py, which is not as checksums\.json lists it"):
        find(tmp_path, (str(brought),))
