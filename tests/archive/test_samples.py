"""Sample pictures: chosen evenly and the same each time, safely named, replaced as a whole, from a run or a folder."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from archive import samples
from archive.build import Built
from archive.samples import LIST, Labelled, Sample, choose, in_folder, place, replace
from beeline.errors import ArchiveError
from beeline.spec import ModelSpec
from cli.archive import app
from tests.conftest import BLUE, GREEN, RED, picture
from train import data as room
from train.config import compose
from train.generate import generate
from train.runs import Run, create, finish

JPEG = picture((9, 9, 9), kind="JPEG")
MakeRun = Callable[..., Run]


def files(folder: Path, *names: str) -> list[Labelled]:
    """Write a picture for each `label/name`, and return them with their labels."""
    pictures: list[Labelled] = []
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture((len(pictures) * 7 % 256, 20, 30)))
        pictures.append((path, path.parent.name))
    return pictures


def labels(chosen: list[Sample]) -> list[str | None]:
    return [sample.label for sample in chosen]


def rows(folder: Path) -> list[dict[str, Any]]:
    read: list[dict[str, Any]] = json.loads((folder / LIST).read_text(encoding="utf-8"))
    return read


@pytest.fixture
def spec(tiny_built: Built) -> ModelSpec:
    return tiny_built.spec


def test_two_of_each_label_in_turn_and_the_same_each_time(tmp_path: Path) -> None:
    given = files(tmp_path, "ants/1.png", "ants/2.png", "ants/3.png", "bees/1.png", "bees/2.png", "flies/1.png")
    chosen = choose(given)
    assert labels(chosen) == ["ants", "bees", "flies", "ants", "bees"]
    assert chosen[0].data == given[0][0].read_bytes()
    assert choose(iter(given)) == chosen


@pytest.mark.parametrize(("count", "twice"), [(6, 6), (7, 5), (12, 0), (40, 0)])
def test_at_most_twelve_evenly_over_the_labels(tmp_path: Path, count: int, twice: int) -> None:
    given = files(tmp_path, *(f"{label:03}/{n}.png" for label in range(count) for n in range(3)))
    counts = Counter(labels(choose(given)))
    assert sum(counts.values()) == 12
    assert sorted(counts.values()).count(2) == twice
    if count == 40:
        assert sorted(map(str, counts)) == [f"{index * 40 // 12:03}" for index in range(12)]


def test_files_that_a_page_cannot_show_are_skipped(tmp_path: Path) -> None:
    given = files(tmp_path, *(f"a/{n}.png" for n in range(7)))
    paths = [path for path, _ in given]
    tiff = picture((1, 2, 3), kind="TIFF")
    for path, data in zip(paths, (b"no picture", RED[:60], b"", RED + bytes(samples.MAX_BYTES), tiff), strict=False):
        path.write_bytes(data)
    paths[5].unlink()
    # The content gives the ending.
    paths[6].write_bytes(JPEG)
    assert choose([*given, (tmp_path, "a")]) == [Sample(JPEG, "jpg", "a")]


def test_a_folder_may_have_labels_or_none(tmp_path: Path) -> None:
    files(tmp_path, "ants/deep/1.png", "bees/1.png", "__MACOSX/1.png")
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(picture((n, n, n)))
    (tmp_path / ".hidden.png").write_bytes(RED)
    assert labels(choose(in_folder(tmp_path))) == [None, None, None, None, "ants", "bees"]


def test_names_are_safe_labels_are_unchanged_and_everybody_may_read(tmp_path: Path, spec: ModelSpec) -> None:
    given = ["Café au lait", "cafe au lait", "../../etc", "蜜蜂", "蚂蚁", ".", "a" * 300, "n1, dog", None]
    before = os.umask(0o077)
    try:
        target = replace(tmp_path, spec, [Sample(JPEG, "jpg", label) for label in given], "a set")
    finally:
        os.umask(before)
    assert target == place(tmp_path, spec)
    assert {path.stat().st_mode & 0o777 for path in (target, *target.iterdir())} == {0o755, 0o644}
    assert [(row["label"], row["source"]) for row in rows(target)] == [(label, "a set") for label in given]
    names = [row["file"] for row in rows(target)]
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*-[0-9]+\.jpg", name) for name in names), names
    assert [names[0], names[1], names[-1]] == ["Cafe_au_lait-1.jpg", "cafe_au_lait-2.jpg", "picture-1.jpg"]
    assert len({name.lower() for name in names}) == len(names)
    assert sorted(path.name for path in target.iterdir()) == sorted([LIST, *names])


def test_new_samples_replace_the_old_ones_and_none_remove_them(tmp_path: Path, spec: ModelSpec) -> None:
    replace(tmp_path, spec, [Sample(RED, "png", "old"), Sample(BLUE, "png", "old")], "first")
    target = replace(tmp_path, spec, [Sample(GREEN, "png", "new")], "second")
    assert target is not None
    assert sorted(path.name for path in target.iterdir()) == ["new-1.png", LIST]
    assert [path.name for path in tmp_path.iterdir()] == [samples.FOLDER]
    for _ in range(2):
        assert replace(tmp_path, spec, [], "") is None
        assert not target.exists()


def test_there_is_no_instant_without_samples(tmp_path: Path, spec: ModelSpec) -> None:
    target = replace(tmp_path, spec, [Sample(RED, "png", "one")], "a set")
    assert target is not None
    with ThreadPoolExecutor(1) as pool:
        looks = pool.submit(lambda: [target.is_dir() for _ in range(20_000)])
        while not looks.done():
            for label in ("two", "one"):
                replace(tmp_path, spec, [Sample(RED, "png", label)], "a set")
    assert all(looks.result())


def test_a_file_system_that_cannot_exchange_folders_replaces_them_in_two_steps(
    tmp_path: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A fake: a C library without the call.
    monkeypatch.setattr("host.files.ctypes.CDLL", lambda *_, **__: object())
    for label in ("old", "new"):
        target = replace(tmp_path, spec, [Sample(RED, "png", label)], "a set")
    assert target is not None
    assert [path.name for path in tmp_path.iterdir()] == [samples.FOLDER]
    rename, renames = Path.rename, iter(range(9))

    def fail_at_the_end(path: Path, to: Path) -> Path:
        if next(renames) == 2:
            raise OSError(28, "No space left on device")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fail_at_the_end)
    with pytest.raises(OSError, match="No space"):
        replace(tmp_path, spec, [Sample(RED, "png", "newest")], "a set")
    assert [path.name for path in sorted(target.iterdir())] == ["new-1.png", LIST]


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    return generate(tmp_path / "cache", train=3, val=3)


@pytest.fixture
def make_run(tiny_export: Path, tmp_path: Path) -> MakeRun:
    """A finished run on pictures, without training: its record, its configuration and an export."""

    def make(folder: Path, name: str | None = None) -> Run:
        data = room.read(folder, name=name)
        run = create("tiny", "abcdef", tmp_path / "runs")
        compose([f"data.folder='{folder}'"], environ={}).save(run / "config.yaml")
        shutil.copytree(tiny_export, run / "export")
        recorded = {"name": data.name, "generated": data.generated, "digest": data.digest}
        return finish(run, {"fingerprint": "abcdef", "labels": ["a"], "accuracy": 0.5, "data": recorded})

    return make


def build(*words: object) -> tuple[dict[str, Any], str]:
    done = CliRunner().invoke(app, ["build", *map(str, words), "--no-verify", "--json"])
    assert done.exception is None, done.exception
    return json.loads(done.stdout.splitlines()[-1]), " ".join(done.stderr.split())


def test_a_runs_samples_are_its_validation_pictures_and_reuse_keeps_them(
    drawn: Path, make_run: MakeRun, tmp_path: Path
) -> None:
    run, store = make_run(drawn, name="drawn ones"), tmp_path / "store"
    built, said = build(run.folder, "--store", store, "--reuse")
    folder = store / "samples" / "tiny" / "1.0"
    assert built["samples"] == str(folder)
    assert "4 samples from drawn ones" in said
    names = ["circles-1.png", "stripes-1.png", "circles-2.png", "stripes-2.png"]
    listed = [{"file": name, "label": name.partition("-")[0], "source": "drawn ones"} for name in names]
    assert rows(folder) == listed
    assert (folder / "stripes-2.png").read_bytes() == (drawn / "val" / "stripes" / "001.png").read_bytes()
    (folder / LIST).write_text("[]")
    built, said = build(run.export, "--store", store, "--reuse")
    assert (built["reused"], rows(folder)) == (True, [])
    assert "the same as before" in said
    shutil.rmtree(folder)
    build(run.folder, "--store", store, "--reuse")
    assert rows(folder) == listed


def test_a_run_whose_pictures_are_gone_is_built_without_samples(
    drawn: Path, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BEELINE_DATA", raising=False)
    run, store = make_run(drawn), tmp_path / "store"
    build(run.folder, "--store", store)
    moved = drawn.rename(drawn.with_name("moved"))
    built, said = build(run.folder, "--store", store)
    assert built["samples"] is None
    assert f"no samples: the pictures of the run {run.id} are no longer as they were" in said
    assert not (store / "samples" / "tiny" / "1.0").exists()
    assert Path(built["archive"]).is_file()
    # The user knows where they are.
    built, _ = build(run.folder, "--store", store, "--samples", moved / "val")
    assert rows(Path(built["samples"]))[0] == {"file": "circles-1.png", "label": "circles", "source": "val"}


def test_a_folder_without_its_run_has_none_unless_they_are_named(tiny_export: Path, tmp_path: Path) -> None:
    built, said = build(tiny_export, "--store", tmp_path / "store")
    assert built["samples"] is None
    assert "--samples FOLDER" in said
    assert not (tmp_path / "store" / "samples").exists()
    for folder, reason in (("none", "is missing; name a folder"), ("store", "holds no complete picture under 2 MB")):
        with pytest.raises(ArchiveError, match=reason):
            samples.named_samples(tmp_path / folder)
