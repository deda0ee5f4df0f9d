"""Labels: three forms of file, duplicates told apart, gaps refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from archive.labels import read_labels
from beeline.errors import ArchiveError


@pytest.mark.parametrize(
    "text",
    [
        "ants\nbees\n",
        "\ufeffants\r\nbees",
        '["ants", "bees"]',
        '{"1": "bees", "0": "ants"}',
        '{"0": ["n1", "ants"], "1": ["n2", "bees"]}',
    ],
)
def test_every_form_gives_the_labels_in_the_order_of_the_outputs(tmp_path: Path, text: str) -> None:
    path = tmp_path / "labels"
    path.write_text(text, encoding="utf-8")
    assert read_labels(path) == ("ants", "bees")


def test_ten_and_more_classes_are_ordered_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "index_to_name.json"
    path.write_text(json.dumps({str(i): f"class {i}" for i in range(12)}, sort_keys=True))
    assert read_labels(path) == tuple(f"class {i}" for i in range(12))


def test_duplicates_are_told_apart_by_id_or_by_index(tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    path.write_text('{"0": ["n02012849", "crane"], "1": ["n1", "ox"], "2": ["n03126707", "crane"]}')
    assert read_labels(path) == ("crane (n02012849)", "ox", "crane (n03126707)")
    path.write_text("crane\nox\ncrane\n")
    assert read_labels(path) == ("crane (0)", "ox", "crane (2)")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("ants\n\nbees\n", "line 2 .* is blank"),
        ('{"0": "ants", "2": "bees"}', "none for class 1 .*'2'.*; number the classes 0 to 1"),
        ('{"0": "ants", "one": "bees"}', "none for class 1 .*'one'"),
        ('["ants", 3]', "class 1 .* is 3; allowed"),
        ('["ants", ', "begins like JSON but cannot be read as JSON"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "labels"
    path.write_text(text)
    with pytest.raises(ArchiveError, match=told):
        read_labels(path)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="cannot be read"):
        read_labels(tmp_path / "none.txt")


@pytest.mark.shared
def test_imagenets_two_cranes_and_two_maillots_all_stay(shared_data: Path) -> None:
    labels = read_labels(shared_data / "imagenet_samples" / "index_to_name.json")
    assert len(labels) == len(set(labels)) == 1000
    assert (labels[134], labels[517]) == ("crane (n02012849)", "crane (n03126707)")
    assert {labels[638], labels[639]} == {"maillot (n03710637)", "maillot (n03710721)"}
    assert labels[0] == "tench"
