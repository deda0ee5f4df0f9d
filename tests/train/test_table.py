"""A CSV of path and label as a data set."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest

from beeline.answer import Answer
from host import silent
from train.data import find_data, labelled_pictures, read
from train.errors import DataError
from train.evaluate import evaluate


def table(path: Path, rows: Sequence[tuple[str, ...]], head: tuple[str, ...] = ("path", "label")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])
    return path


def pictures(drawn: Path, half: str = "train") -> list[tuple[str, str]]:
    return [(str(path), path.parent.name) for path in sorted((drawn / half).rglob("*.png"))]


def test_a_share_of_each_label_is_held_out_wherever_the_pictures_lie(drawn: Path, tmp_path: Path) -> None:
    file = table(tmp_path / "shapes.csv", pictures(drawn))
    said: list[str] = []
    data = find_data(file, said.append, 0.25)
    assert (data.name, data.labels, data.split) == ("shapes", ("circles", "stripes"), "25% of each class held out")
    assert (data.train.counts(), data.val.counts()) == ({"circles": 6, "stripes": 6}, {"circles": 2, "stripes": 2})
    assert f"data: shapes, the folder {file}" in said[0]
    assert all(path.parent.name == label for half in (data.train, data.val) for path, label in half.labelled())


def test_paths_are_relative_to_the_file_and_a_column_gives_the_halves(drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "here").symlink_to(drawn)
    rows = [
        (f"here/{half}/{label}/{number:03}.png", label, {"train": "Training", "val": "valid"}[half])
        for half in ("train", "val")
        for label in ("circles", "stripes")
        for number in range(3)
    ]
    left_out = ("gone.png", "circles", "test")
    data = read(table(tmp_path / "halves.csv", [*rows, left_out], ("Path", " Label", "split")))
    assert (len(data.train), len(data.val), data.split) == (6, 6, "the column split of halves.csv")


def test_another_label_is_other_data(drawn: Path, tmp_path: Path) -> None:
    rows = pictures(drawn)
    first = read(table(tmp_path / "a.csv", rows))
    again = read(table(tmp_path / "b.csv", rows[::-1]))
    other = read(table(tmp_path / "c.csv", [(rows[0][0], "stripes"), *rows[1:]]))
    assert {each.path for each in first.val.pictures} == {each.path for each in again.val.pictures}
    assert first.train.digest == again.train.digest
    assert first.train.digest != other.train.digest


@pytest.mark.parametrize(
    ("rows", "head", "sentence"),
    [
        ([("x.png", "a")], ("file", "label"), r"has the columns file, label; name them path and label"),
        ([], (), r"has the columns \(none\); name them path and label"),
        ([("x.png", "")], ("path", "label"), r"line 2 of \S+ is x\.png,,; give path, label"),
        ([("x.png", "a"), ("./x.png", "b")], ("path", "label"), r"line 3 of \S+ names \./x\.png again"),
        (
            [("x.png", "a", "half")],
            ("path", "label", "split"),
            r"line 2 of \S+ is x\.png,a,half; give .*\(train or val\)",
        ),
        ([("x.png", "a"), ("y.png", "b")], ("path", "label"), r"2 of 2 pictures of \S+ are missing: .*x\.png"),
    ],
)
def test_a_wrong_line_is_one_sentence(
    tmp_path: Path, rows: list[tuple[str, ...]], head: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        read(table(tmp_path / "t.csv", rows, head))


def test_missing_labels_files_and_broken_pictures_are_sentences(drawn: Path, tmp_path: Path) -> None:
    rows = pictures(drawn)
    with pytest.raises(DataError, match="has only the label 'circles'; a classifier needs two or more"):
        read(table(tmp_path / "t.csv", [row for row in rows if row[1] == "circles"]))
    halves = [(*row, "train") for row in rows] + [
        (*row, "val") for row in pictures(drawn, "val") if row[1] == "circles"
    ]
    with pytest.raises(DataError, match="has no pictures of 'stripes' whose split is val"):
        read(table(tmp_path / "t.csv", halves, ("path", "label", "split")))
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"broken\.png"):
        read(table(tmp_path / "t.csv", [*rows, ("broken.png", "circles")]))
    with pytest.raises(DataError, match="cannot be read as CSV"):
        find_data(tmp_path / "missing.csv", silent)
    (tmp_path / "t.csv").write_bytes(b"path,label\n\xff\xfe,x\n")
    with pytest.raises(DataError, match="save it as UTF-8"):
        read(tmp_path / "t.csv")


def test_evaluation_takes_the_lines_of_val_else_of_test_else_all(drawn: Path, tmp_path: Path) -> None:
    halves = [(path, label, half) for half in ("train", "val") for path, label in pictures(drawn, half)]
    rows = {"val": halves, "test": [(path, label, "test") for path, label, half in halves if half == "val"]}
    for name, lines in rows.items():
        found = labelled_pictures(table(tmp_path / f"{name}.csv", lines, ("path", "label", "split")))
        assert found.labelled() == [(Path(path), label) for path, label in pictures(drawn, "val")]
    gone = table(tmp_path / "all.csv", [*pictures(drawn), ("gone.png", "circles")])
    found = labelled_pictures(gone)
    assert (len(found), found.root, found.pictures[-1].path) == (17, gone, tmp_path / "gone.png")
    report = evaluate(lambda bodies: [Answer(200, "OK", '{"circles": 1.0}') for _ in bodies], found)
    assert (report.right, len(report.judged), list(report.failures())) == (8, 17, [0])
