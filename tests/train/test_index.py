"""The index of a picture folder: nothing is read twice, a changed file is, and the disk holds a bounded number."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from host import silent
from train import index
from train.data import read
from train.index import Fact, examine


@pytest.fixture
def folder(tmp_path: Path, drawn: Path) -> Path:
    """Pictures that were written long ago."""
    copied = Path(shutil.copytree(drawn, tmp_path / "set"))
    for path in copied.rglob("*.png"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    return copied


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were opened."""
    names: list[str] = []

    def recorded(path: Path) -> Fact:
        names.append(path.name)
        return real(path)

    real = index._read
    monkeypatch.setattr(index, "_read", recorded)
    return names


def test_a_second_start_reads_only_what_changed(folder: Path, readings: list[str]) -> None:
    first = read(folder)
    assert len(readings) == len(set(first.train.pictures) | set(first.val.pictures)) == 24
    assert read(folder).digest == first.digest
    assert len(readings) == 24
    # Another size, and the same size at another time.
    (folder / "train/circles/000.png").write_bytes((folder / "train/circles/001.png").read_bytes())
    os.utime(folder / "val/circles/000.png", (1_000_000_001, 1_000_000_001))
    assert read(folder).digest != first.digest
    assert readings[24:] == ["000.png", "000.png"]


def test_a_file_that_has_just_changed_is_read_again(folder: Path, readings: list[str]) -> None:
    """A second change at the same time, as the file system counts it, would not be seen."""
    path = folder / "val/circles/000.png"
    path.touch()
    for count in (1, 2):
        examine(folder, [path], silent)
        assert len(readings) == count


def test_another_pillow_or_a_damaged_index_reads_again(
    folder: Path, readings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read(folder)
    monkeypatch.setattr("train.index.formats.pillow_version", lambda: "of tomorrow")
    read(folder)
    assert len(readings) == 48
    for path in index.FOLDER.glob("*.json"):
        path.write_text('{"reader": 1')
    assert read(folder).digest
    assert len(readings) == 72


def test_the_indexes_of_the_last_sets_are_kept_and_without_files_that_are_gone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "FOLDER", kept := tmp_path / "index")
    paths = sorted(folder.rglob("*.png"))
    for number in range(20):
        examine(folder / str(number), paths, silent)
    assert len(list(kept.iterdir())) == 16
    paths[0].unlink()
    examine(folder / "19", paths[1:3], silent)
    newest = max(kept.iterdir(), key=os.path.getmtime).read_text()
    assert str(paths[0]) not in newest
    assert str(paths[5]) in newest


def test_a_full_disk_costs_only_the_next_reading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.index.write_whole", full)
    assert read(folder).digest
