"""Building: the same bytes anywhere, the tree of handlers/, and only a verified archive changes the store."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from archive.build import HANDLERS, Built, build, check_config, origin, unchanged
from archive.mar import MANIFEST, check
from archive.store import INDEX, read_index
from beeline.errors import ArchiveError, BeelineError, ConfigError
from beeline.spec import ModelSpec
from tests import digests
from tests.archive.conftest import Files
from tests.conftest import ROOT


def test_the_archive_holds_handlers_and_the_export_in_a_fixed_order_with_one_date_and_permission(
    tiny_built: Built, tiny_files: Files, tiny_export: Path
) -> None:
    files = {p.relative_to(HANDLERS).as_posix(): p.read_bytes() for p in HANDLERS.rglob("*.py")}
    files |= {p.relative_to(tiny_export).as_posix(): p.read_bytes() for p in tiny_export.rglob("*") if p.is_file()}
    assert {name: tiny_files[name] for name in tiny_files if name not in (MANIFEST, "checksums.json")} == files
    with zipfile.ZipFile(tiny_built.path) as archive:
        entries = archive.infolist()
    assert [entry.filename for entry in entries] == [MANIFEST, *sorted([*files, "checksums.json"])]
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert {(entry.external_attr >> 16, entry.compress_type) for entry in entries} == {(0o100644, zipfile.ZIP_STORED)}


def test_the_manifest_is_that_of_torch_model_archiver_but_for_the_date(
    tiny_export: Path, tiny_files: Files, tmp_path: Path
) -> None:
    words = ["-m", "model_archiver.model_packaging", "--model-name", "tiny", "--version", "1.0"]
    paths = ["--serialized-file", f"{tiny_export}/model.pt2", "--handler", f"{HANDLERS}/vision_handler.py"]
    subprocess.run([sys.executable, *words, *paths, "--export-path", str(tmp_path)], check=True)
    with zipfile.ZipFile(tmp_path / "tiny.mar") as archive:
        manifest = json.loads(archive.read(MANIFEST))
    assert json.loads(tiny_files[MANIFEST]) == {**manifest, "createdOn": "01/01/1980 00:00:00"}


def test_it_is_verified_and_listed(tiny_built: Built) -> None:
    assert tiny_built.verified is not None
    verified = tiny_built.verified
    assert (verified.pictures, verified.mar, verified.spec) == (4, tiny_built.path, tiny_built.spec)
    assert verified.choice["precision"][0] == "fp32"
    entry = read_index(tiny_built.path.parent)["tiny.mar"]
    assert (entry.sha256, entry.bytes) == (tiny_built.sha256, tiny_built.path.stat().st_size)
    assert entry.fingerprint == tiny_built.spec.fingerprint()
    assert sorted(p.name for p in tiny_built.path.parent.iterdir()) == [".lock", INDEX, "tiny.mar"]


def test_another_process_folder_umask_and_file_times_give_the_same_bytes(
    tiny_built: Built, tiny_export: Path, tmp_path: Path
) -> None:
    export = tmp_path / "a, folder [of] mine"
    shutil.copytree(tiny_export, export, copy_function=shutil.copyfile)
    for path in export.rglob("*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    handlers = tmp_path / "handlers"
    shutil.copytree(HANDLERS, handlers, copy_function=shutil.copyfile)
    (handlers / "beeline" / "__pycache__").mkdir(exist_ok=True)
    (handlers / "beeline" / "__pycache__" / "spec.cpython-311.pyc").write_bytes(b"compiled")
    (handlers / "beeline" / ".spec.py.swp").write_bytes(b"an editor's")
    program = (
        "import os, sys, pathlib; os.umask(0o077)\n"
        "from archive.build import build\n"
        f"build(pathlib.Path({export.name!r}), pathlib.Path('store'), check=False, handlers=pathlib.Path('handlers'))\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "9", "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "store" / "tiny.mar").read_bytes() == tiny_built.path.read_bytes()


def test_reuse_keeps_the_same_archive_and_builds_a_changed_one_again(tiny_export: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = build(tiny_export, store, check=False, reuse=True)
    written = first.path.stat().st_mtime_ns
    again = build(tiny_export, store, check=False, reuse=True)
    assert (first.reused, again.reused) == (False, True)
    assert again.sha256 == first.sha256
    assert first.path.stat().st_mtime_ns == written
    first.path.write_bytes(b"changed")
    assert not build(tiny_export, store, check=False, reuse=True).reused
    assert check(first.path).spec == first.spec


def test_an_archive_of_the_same_origin_is_found_without_torch_and_a_changed_one_is_not(
    tiny_export: Path, tmp_path: Path
) -> None:
    store, made_of = tmp_path / "store", origin(tiny_export)
    built = build(tiny_export, store, check=False, origin=made_of)
    code = (
        "import sys; from pathlib import Path; from archive.build import origin, unchanged\n"
        f"export = Path({str(tiny_export)!r})\n"
        f"print(unchanged(export, Path({str(store)!r}), origin(export)).sha256, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [built.sha256, "False"]
    same = unchanged(tiny_export, store, made_of)
    assert same is not None
    assert (same.reused, same.spec, same.bytes) == (True, built.spec, built.bytes)
    assert unchanged(tiny_export, store, "0" * 64) is None
    built.path.write_bytes(b"changed")
    assert unchanged(tiny_export, store, made_of) is None


def test_the_origin_changes_with_export_code_engine_and_version(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export, handlers = tmp_path / "export", tmp_path / "handlers"
    shutil.copytree(tiny_export, export)
    shutil.copytree(HANDLERS, handlers)
    seen = [origin(tiny_export)]
    assert origin(export, handlers) == seen[0]
    (handlers / "vision_handler.py").write_text("# changed")
    seen.append(origin(export, handlers))
    dataclasses.replace(ModelSpec.load(export), top_k=1).save(export / "model_spec.json")
    seen.append(origin(export))
    monkeypatch.setattr("host.machine.gpus", lambda: ["H100"])
    monkeypatch.delenv("BEELINE_DEVICE", raising=False)
    seen.append(origin(tiny_export))
    monkeypatch.setattr("archive.build.BUILD", 1000)
    seen.append(origin(tiny_export))
    assert len(set(seen)) == len(seen)


def test_the_code_that_makes_an_archive_is_the_recorded_one() -> None:
    digests.check("BUILD")


def test_a_users_handler_replaces_the_default_one_and_is_verified(tiny_export: Path, tmp_path: Path) -> None:
    handler = tmp_path / "thresholded.py"
    handler.write_text(
        "from vision_handler import VisionHandler\n\n\n"
        "class Thresholded(VisionHandler):\n"
        "    def postprocess(self, logits, batch):\n"
        "        return super().postprocess(logits - 1.0, batch)\n"
    )
    built = build(tiny_export, tmp_path / "store", handler=handler)
    contents = check(built.path)
    assert contents.handler == "thresholded.py"
    assert {"thresholded.py", "vision_handler.py"} <= set(contents.sizes)
    assert built.verified is not None
    handler.write_text(handler.read_text().replace("logits - 1.0", "logits[:, ::-1]"))
    with pytest.raises(ArchiveError, match=r"by thresholded\.py, expected"):
        build(tiny_export, tmp_path / "store", handler=handler)


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        ("mine.py", "x = 1\n", "classes none"),
        ("mine.py", "class A: ...\nclass B: ...\n", "classes A, B"),
        ("mine.py", "class A: ...\ndef handle(data, context): ...\n", "has a function handle"),
        ("mine.py", "class A(:\n", "cannot be read as Python"),
        ("vision_handler.py", "class A: ...\n", "cannot have that name"),
        ("beeline.py", "class A: ...\n", "cannot have that name"),
        ("my-handler.py", "class A: ...\n", "cannot have that name"),
    ],
)
def test_a_handler_that_servers_would_not_load_is_refused(
    tiny_export: Path, tmp_path: Path, name: str, source: str, reason: str
) -> None:
    (tmp_path / name).write_text(source)
    with pytest.raises(ArchiveError, match=reason):
        build(tiny_export, tmp_path / "store", handler=tmp_path / name, check=False)
    assert list((tmp_path / "store").iterdir()) == []


def test_a_model_config_goes_in_and_a_batching_key_does_not(tiny_export: Path, tmp_path: Path) -> None:
    config = tmp_path / "anything.yaml"
    config.write_text("deviceType: cpu\ndeviceIds: [0, 1]\nmaxRetryTimeoutInSec: 60\n")
    built = build(tiny_export, tmp_path / "store", config=config, check=False)
    with zipfile.ZipFile(built.path) as archive:
        assert archive.read("model-config.yaml") == config.read_bytes()
        assert json.loads(archive.read(MANIFEST))["model"]["configFile"] == "model-config.yaml"
    assert check(built.path).spec == built.spec
    config.write_text("batchSize: 8\n")
    with pytest.raises(ConfigError, match="batchSize"):
        build(tiny_export, tmp_path / "store", config=config, check=False)


def test_an_archive_that_does_not_verify_replaces_nothing(tiny_export: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    good = build(tiny_export, store, check=False)
    export = tmp_path / "export"
    shutil.copytree(tiny_export, export)
    expected = export / "golden" / "expected.json"
    values = json.loads(expected.read_text())
    values["pictures"][0]["top"][0][1] -= 0.2
    expected.write_text(json.dumps(values))
    with pytest.raises(ArchiveError, match=r"golden/0\.jpg gives 'ants' .* expected .* within 0\.02") as caught:
        build(export, store)
    assert ".build-" not in str(caught.value)
    assert read_index(store)["tiny.mar"].sha256 == good.sha256
    assert sorted(p.name for p in store.iterdir()) == [".lock", INDEX, "tiny.mar"]


def test_an_export_that_was_changed_or_is_from_other_geometry_is_refused(tiny_export: Path, tmp_path: Path) -> None:
    export = tmp_path / "export"
    shutil.copytree(tiny_export, export)
    spec = ModelSpec.load(export)
    (export / "model.pt2").write_bytes(b"another model")
    with pytest.raises(ArchiveError, match=r"model\.pt2 has sha256 .*, its spec says .*export it again"):
        build(export, tmp_path / "store", check=False)
    shutil.copyfile(tiny_export / "model.pt2", export / "model.pt2")
    values = {**spec.to_dict(), "geometry_version": 2}
    before = {**values, "schema": 1, "geometry_version": None, "geometry_sha256": "0" * 64}
    for other, made in ((values, "with geometry version 2"), (before, "before geometry had a version")):
        ModelSpec.from_dict(other).save(export / "model_spec.json")
        with pytest.raises(ArchiveError, match=rf"exported {made}, and .* has version 1; export the model again: `bee"):
            build(export, tmp_path / "store", check=False)
    with pytest.raises(BeelineError, match="is missing"):
        build(tmp_path, tmp_path / "store", check=False)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("batchSize: 8", "batchSize to 8, which would override config/config.properties.* set it there, under models"),
        ("jobQueueSize: 1", "jobQueueSize"),
        ("batchsize: 8", "unknown key 'batchsize'; did you mean 'batchSize'"),
        ("devicetype: cpu", "did you mean 'deviceType'"),
        ("deviceType: 3", "deviceType to 3; allowed: text"),
        ("maxRetryTimeoutInSec: true", "allowed: a whole number"),
        ("clientTimeoutInMills: 100", "waits forever"),
        ("- deviceType", "holds a list"),
        ("deviceType: [", "cannot be read as YAML .*correct it or leave --model-config out"),
        ("", "holds a NoneType"),
    ],
)
def test_a_model_config_that_is_ignored_or_does_harm_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "model-config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        check_config(path)
