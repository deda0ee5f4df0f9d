"""Every form of tampering is refused, with a sentence that names the first thing that differs."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from archive.build import Built
from archive.mar import RULES, check, unpack
from beeline.errors import ArchiveError
from tests.archive.conftest import Files, MakeMar

Change = Callable[[Files], Files]


def edited(name: str, change: Callable[[dict[str, Any]], None]) -> Change:
    """Change a JSON file and leave the record of it as it is."""

    def apply(files: Files) -> Files:
        values = json.loads(files[name])
        change(values)
        return {**files, name: json.dumps(values).encode()}

    return apply


def recorded(change: Change, *names: str) -> Change:
    """Change files and record their new digests, as somebody would who knows the format."""

    def apply(files: Files) -> Files:
        files = change(files)
        record = json.loads(files["checksums.json"])
        for name in names:
            record["files"][name] = hashlib.sha256(files[name]).hexdigest()
        return {**files, "checksums.json": json.dumps(record).encode()}

    return apply


def without(name: str) -> Change:
    return lambda files: {key: data for key, data in files.items() if key != name}


MANIFEST = "MAR-INF/MANIFEST.json"
TAMPERINGS: dict[str, tuple[Change, str]] = {
    "model": (
        lambda files: {**files, "model.pt2": files["model.pt2"] + b"x"},
        r"model\.pt2 has sha256 [0-9a-f]{12}, expected [0-9a-f]{12}",
    ),
    "code": (lambda files: {**files, "beeline/answer.py": b"import os\n"}, r"beeline/answer\.py has sha256"),
    "picture": (lambda files: {**files, "golden/0.jpg": b""}, r"golden/0\.jpg has sha256"),
    "labels": (edited("model_spec.json", lambda v: v["labels"].reverse()), r"model_spec\.json has sha256"),
    "recorded labels": (
        recorded(edited("model_spec.json", lambda v: v["labels"].reverse()), "model_spec.json"),
        "the spec's fingerprint has sha256",
    ),
    "recorded model": (
        recorded(lambda files: {**files, "model.pt2": b"another"}, "model.pt2"),
        r"model\.pt2 has sha256",
    ),
    "added": (lambda files: {**files, "sitecustomize.py": b""}, r"holds sitecustomize\.py, which checksums\.json does"),
    "removed": (without("beeline/batch.py"), r"lacks beeline/batch\.py"),
    "no record": (without("checksums.json"), r"holds no checksums\.json; build it with"),
    "no manifest": (without(MANIFEST), "holds no MAR-INF"),
    "no spec": (without("model_spec.json"), r"holds no model_spec\.json"),
    "broken record": (lambda files: {**files, "checksums.json": b"{"}, r"checksums\.json is no JSON"),
    "empty record": (lambda files: {**files, "checksums.json": b"{}"}, "lists no files"),
    "other handler": (edited(MANIFEST, lambda v: v["model"].update(handler="evil.py")), "'evil.py', which is not in"),
    "other name": (
        edited(MANIFEST, lambda v: v["model"].update(modelName="x")),
        "model.modelName 'x', expected 'tiny'",
    ),
    "packages to install": (
        edited(MANIFEST, lambda v: v["model"].update(requirementsFile="r.txt")),
        r"model\.requirementsFile 'r\.txt', expected None",
    ),
    "other date": (edited(MANIFEST, lambda v: v.update(createdOn="today")), "createdOn 'today'"),
    "broken manifest": (lambda files: {**files, MANIFEST: b"[]"}, "MANIFEST.json cannot be read"),
    "no goldens": (
        recorded(edited("golden/expected.json", lambda v: v["pictures"].clear()), "golden/expected.json"),
        "lists no golden picture",
    ),
}


@pytest.mark.parametrize("case", TAMPERINGS)
def test_a_changed_archive_is_refused_with_what_differs(tiny_files: Files, make_mar: MakeMar, case: str) -> None:
    change, told = TAMPERINGS[case]
    with pytest.raises(ArchiveError, match=told):
        check(make_mar(change(dict(tiny_files))))


def test_the_same_files_zipped_again_are_fine(tiny_files: Files, make_mar: MakeMar) -> None:
    held = check(make_mar(tiny_files))
    assert held.spec.name == "tiny"
    assert held.sizes["model.pt2"] == len(tiny_files["model.pt2"])


def info(name: str, mode: int = 0o100644) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = mode << 16
    return entry


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (info("../outside.txt"), "points outside the folder"),
        (info("beeline/../../outside.txt"), "points outside the folder"),
        (info("/etc/outside.txt"), "points outside the folder"),
        (info("./outside.txt"), "forbidden character in its name or is no file"),
        (info("folder/"), "is no file"),
        (info("C:outside.txt"), "points outside the folder"),
        (info("..\\outside.txt"), "points outside the folder"),
        (info("new\nline"), "forbidden character"),
        (info("beeline/C:outside.txt"), "forbidden character"),
        (info("link", 0o120777), "is a link"),
        (info("pipe", 0o010644), "is a link or a device"),
        (info("beeline"), "as a file and as a folder"),
    ],
)
def test_an_entry_that_leads_elsewhere_is_refused_and_nothing_is_unpacked(
    make_mar: MakeMar, tmp_path: Path, entry: zipfile.ZipInfo, told: str
) -> None:
    mar = make_mar([("beeline/spec.py", b""), (entry, b"/etc/passwd")])
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ArchiveError, match=told):
        unpack(mar, out)
    assert list(out.iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made.mar", "out"]


def test_a_name_that_is_there_twice_is_refused(make_mar: MakeMar) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        mar = make_mar([("a.py", b"good"), ("a.py", b"evil")])
    with pytest.raises(ArchiveError, match=r"'a\.py' twice"):
        check(mar)


def test_a_bomb_is_refused_by_what_it_declares(make_mar: MakeMar, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = info("zeros")
    bomb.compress_type = zipfile.ZIP_DEFLATED
    mar = make_mar([(bomb, bytes(20_000_000))])
    assert mar.stat().st_size < 100_000
    with pytest.raises(ArchiveError, match=r"claims to grow \d+-fold"):
        check(mar)
    monkeypatch.setattr("archive.mar.RULES", dataclasses.replace(RULES, max_bytes=10_000_000))
    with pytest.raises(ArchiveError, match="unpacks to more than the limit of 10000000 bytes"):
        check(mar)
    monkeypatch.setattr("archive.mar.RULES", dataclasses.replace(RULES, max_files=2))
    with pytest.raises(ArchiveError, match="holds 3 entries; the limit is 2"):
        check(make_mar({"a": b"", "b": b"", "c": b""}))


@pytest.mark.parametrize("kept", [0, 3, 1000, -1, -30])
def test_an_archive_that_is_cut_off_is_refused(tiny_built: Built, tmp_path: Path, kept: int) -> None:
    mar = tmp_path / "cut.mar"
    mar.write_bytes(tiny_built.path.read_bytes()[:kept])
    # The model in it is a zip file as well, whose end is found where the archive's own is cut off.
    with pytest.raises(ArchiveError, match=r"cut off, damaged or no zip file|that its directory does not list"):
        check(mar)


def test_a_flipped_bit_in_a_file_names_the_file(tiny_built: Built, tmp_path: Path) -> None:
    data = bytearray(tiny_built.path.read_bytes())
    place = data.find(b'"""ModelSpec')
    data[place + 5] ^= 1
    mar = tmp_path / "flipped.mar"
    mar.write_bytes(data)
    with pytest.raises(ArchiveError, match=r"Bad CRC-32 for file 'beeline/spec\.py'"):
        check(mar)


def test_bytes_that_only_servers_would_see_are_refused(tiny_built: Built, tmp_path: Path) -> None:
    data = tiny_built.path.read_bytes()
    hidden = io.BytesIO()
    with zipfile.ZipFile(hidden, "w") as archive:
        archive.writestr("vision_handler.py", "import os")
    front = hidden.getvalue()[: struct.unpack("<I", hidden.getvalue()[-6:-2])[0]]
    mar = tmp_path / "two-faced.mar"
    for changed, told in ((front + data, "does not list"), (data + b"more", "cut off, damaged|belong to no file")):
        mar.write_bytes(changed)
        with pytest.raises(ArchiveError, match=told):
            check(mar)
    with zipfile.ZipFile(tiny_built.path) as archive:
        place = archive.getinfo("vision_handler.py").header_offset + 30
    renamed = bytearray(data)
    renamed[place : place + 6] = b"evil__"
    mar.write_bytes(renamed)
    with pytest.raises(ArchiveError):
        check(mar)


def test_no_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="is missing"):
        check(tmp_path / "none.mar")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=3))
def test_changed_headers_are_refused_or_change_nothing(
    tiny_built: Built, tmp_path: Path, flips: list[tuple[float, int]]
) -> None:
    data = bytearray(tiny_built.path.read_bytes())
    with zipfile.ZipFile(tiny_built.path) as archive:
        start = archive.start_dir
    for place, value in flips:
        data[start + int(place * (len(data) - 1 - start))] = value
    mar = tmp_path / "changed.mar"
    mar.write_bytes(data)
    try:
        held = check(mar)
    except ArchiveError:
        return
    assert held == check(tiny_built.path)
