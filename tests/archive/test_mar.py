"""Every form of tampering is refused, with one sentence that names the first difference."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from archive.build import Built, build
from archive.export import export_folder
from archive.mar import RULES, check, read, unpack
from beeline.errors import ArchiveError
from serve.addresses import Ports
from serve.client import InferenceClient
from serve.config import Overrides
from serve.up import Request, up
from tests.archive.conftest import Files, MakeMar, TinyNet, tiny_request

Change = Callable[[Files], Files]


def edited(name: str, change: Callable[[dict[str, Any]], None]) -> Change:
    """Change a JSON file and leave the record of it as it is."""

    def apply(files: Files) -> Files:
        values = json.loads(files[name])
        change(values)
        return {**files, name: json.dumps(values).encode()}

    return apply


def recorded(change: Change, *names: str) -> Change:
    """Change files and record their new digests, like somebody who knows the format."""

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


def put(name: str, data: bytes) -> Change:
    return lambda files: {**files, name: data}


def model_key(**changes: str) -> Change:
    return edited(MANIFEST, lambda values: values["model"].update(changes))


REVERSED = edited("model_spec.json", lambda values: values["labels"].reverse())
NO_PICTURES = edited("golden/expected.json", lambda values: values["pictures"].clear())
TAMPERINGS: dict[str, tuple[Change, str]] = {
    "model": (put("model.pt2", b"other"), r"model\.pt2 has sha256 [0-9a-f]{12}, expected [0-9a-f]{12}"),
    "code": (put("beeline/answer.py", b"import os\n"), r"beeline/answer\.py has sha256"),
    "picture": (put("golden/0.jpg", b""), r"golden/0\.jpg has sha256"),
    "labels": (REVERSED, r"model_spec\.json has sha256"),
    "recorded labels": (recorded(REVERSED, "model_spec.json"), "the spec's fingerprint has sha256"),
    "recorded model": (recorded(put("model.pt2", b"other"), "model.pt2"), r"model\.pt2 has sha256"),
    "added": (put("sitecustomize.py", b""), r"holds sitecustomize\.py, which checksums\.json does"),
    "removed": (without("beeline/batch.py"), r"lacks beeline/batch\.py"),
    "no record": (without("checksums.json"), r"holds no checksums\.json; build it with"),
    "no manifest": (without(MANIFEST), "holds no MAR-INF"),
    "no spec": (without("model_spec.json"), r"holds no model_spec\.json"),
    "broken record": (put("checksums.json", b"{"), r"checksums\.json is not JSON"),
    "empty record": (put("checksums.json", b"{}"), "lists no files"),
    "other handler": (model_key(handler="evil.py"), "'evil.py', which is not there"),
    "other name": (model_key(modelName="x"), "model.modelName 'x', expected 'tiny'"),
    "packages to install": (model_key(requirementsFile="r.txt"), r"model\.requirementsFile 'r\.txt', expected None"),
    "other date": (edited(MANIFEST, lambda values: values.update(createdOn="today")), "createdOn 'today'"),
    "broken manifest": (put(MANIFEST, b"[]"), "MANIFEST.json holds a list, expected an object"),
    "no model": (put(MANIFEST, b"{}"), "names the handler '', which is not there"),
    "no goldens": (recorded(NO_PICTURES, "golden/expected.json"), "lists no golden picture"),
}


@pytest.mark.parametrize("case", TAMPERINGS)
def test_a_changed_archive_is_refused_with_the_difference(tiny_files: Files, make_mar: MakeMar, case: str) -> None:
    change, reason = TAMPERINGS[case]
    assert check(make_mar(tiny_files)).spec.name == "tiny"
    with pytest.raises(ArchiveError, match=reason):
        check(make_mar(change(dict(tiny_files))))


OUTSIDE, FORBIDDEN = "points outside the folder", "forbidden character in its name or is no file"


@pytest.mark.parametrize(
    ("name", "mode", "reason"),
    [
        *((name, 0o100644, OUTSIDE) for name in ("../x", "beeline/../../x", "/etc/x", "C:x", "..\\x")),
        *((name, 0o100644, FORBIDDEN) for name in ("./x", "folder/", "new\nline", "beeline/C:x")),
        ("link", 0o120777, "is a link or a device"),
        ("pipe", 0o010644, "is a link or a device"),
        ("beeline", 0o100644, "as a file and as a folder"),
    ],
)
def test_an_unsafe_entry_is_refused_and_nothing_is_unpacked(
    make_mar: MakeMar, tmp_path: Path, name: str, mode: int, reason: str
) -> None:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = mode << 16
    mar, out = make_mar([("beeline/spec.py", b""), (entry, b"/etc/passwd")]), tmp_path / "out"
    out.mkdir()
    with pytest.raises(ArchiveError, match=reason):
        unpack(mar, out)
    assert list(out.iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made.mar", "out"]


def test_a_name_that_occurs_twice_is_refused(make_mar: MakeMar) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        mar = make_mar([("a.py", b"good"), ("a.py", b"evil")])
    with pytest.raises(ArchiveError, match=r"'a\.py' twice"):
        check(mar)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(make_mar: MakeMar, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = zipfile.ZipInfo("zeros")
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
    # The model in it is a zip file too, and its end is found if the archive's own is cut off.
    with pytest.raises(ArchiveError, match=r"cut off, damaged or no zip file|that its directory does not list"):
        check(mar)


def test_a_flipped_bit_in_a_file_names_the_file(tiny_built: Built, tmp_path: Path) -> None:
    data = bytearray(tiny_built.path.read_bytes())
    data[data.find(b'"""ModelSpec') + 5] ^= 1
    (tmp_path / "flipped.mar").write_bytes(data)
    with pytest.raises(ArchiveError, match=r"Bad CRC-32 for file 'beeline/spec\.py'"):
        check(tmp_path / "flipped.mar")


def test_bytes_that_only_servers_would_see_are_refused(tiny_built: Built, tmp_path: Path) -> None:
    data = tiny_built.path.read_bytes()
    hidden = io.BytesIO()
    with zipfile.ZipFile(hidden, "w") as archive:
        archive.writestr("vision_handler.py", "import os")
    front = hidden.getvalue()[: struct.unpack("<I", hidden.getvalue()[-6:-2])[0]]
    with zipfile.ZipFile(tiny_built.path) as archive:
        place = archive.getinfo("vision_handler.py").header_offset + 30
    renamed = data[:place] + b"evil__" + data[place + 6 :]
    mar = tmp_path / "two-faced.mar"
    hidden_at_the_end = "cut off, damaged|belong to no file"
    for changed, reason in ((front + data, "does not list"), (data + b"more", hidden_at_the_end), (renamed, "names")):
        mar.write_bytes(changed)
        with pytest.raises(ArchiveError, match=reason):
            check(mar)


def test_sizes_over_2_gib_are_written_and_judged(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 2_000)
    built = build(tiny_export, tmp_path, check=False)
    assert check(built.path).spec == built.spec
    data = built.path.read_bytes()
    assert data.rfind(b"PK\6\6") > data.rfind(b"PK\1\2")
    # The last entry's own header, the record of the directory's place, its count of entries, and something before it.
    local = data.rfind(b"PK\3\4")
    size = data.rfind(b"\1\0\x10\0", local)
    end = data.rfind(b"PK\6\6")
    for place in (size + 4, end + 48, end + 32):
        built.path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ArchiveError, match=r"hold|cut off"):
            check(built.path)
    built.path.write_bytes(data[:end] + b"more" + data[end:])
    with pytest.raises(ArchiveError, match=r"hold|cut off"):
        check(built.path)


class Large(TinyNet):
    """The tiny network after a layer of over 2 GiB of weights."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.empty(192 * 15_000, 192).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
        self.wide = torch.nn.Parameter(weight, requires_grad=False)

    def __deepcopy__(self, memo: object) -> Large:
        return self

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        rows = self.pool(pictures).flatten(1)
        scores: torch.Tensor = self.head(rows + 10 * functional.linear(rows, self.wide).unflatten(1, (192, -1)).mean(2))
        return scores


@pytest.mark.bench
def test_a_real_archive_over_2_gib_is_built_verified_and_served(tmp_path: Path) -> None:
    export_folder(Large(), tiny_request(name="large"), tmp_path / "export")
    built = build(tmp_path / "export", tmp_path / "store")
    assert built.bytes > 2 << 30
    assert built.verified is not None
    archive, environ = read(built.path), {**os.environ, "BEELINE_STATE": str(tmp_path)}
    for server in ("torchserve", "mms"):
        numbers = {"overrides": Overrides(workers=1), "ports": Ports(0), "gateway": "none"}
        request = Request(server, (str(built.path),), built.path.parent, **numbers)  # type: ignore[arg-type]
        with up(request, print, environ) as running, InferenceClient(running.state.inference) as client:
            answer = client.predict("large", archive.golden_bytes())
            assert (answer.status, next(iter(answer.json()))) == (200, archive.goldens[0].label)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="is missing"):
        check(tmp_path / "none.mar")


def test_changed_geometry_code_of_schema_1_is_refused_even_if_the_checksums_agree(make_mar: MakeMar) -> None:
    with zipfile.ZipFile(Path(__file__).with_name("schema-1.mar")) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    code = "beeline/pixels.py"
    change = recorded(put(code, files[code] + b"# changed\n"), code)
    with pytest.raises(ArchiveError, match=r"beeline/pixels\.py has sha256 .* build it again"):
        check(make_mar(change(files)))


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
    with contextlib.suppress(ArchiveError):
        assert check(mar) == check(tiny_built.path)
