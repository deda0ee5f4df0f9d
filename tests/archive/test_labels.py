"""Labels in each form whose order is clear; a sentence about each other one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from archive.labels import read_labels
from beeline.errors import ArchiveError

ANTS = ("ants", "bees")


@pytest.mark.parametrize(
    ("name", "text", "labels"),
    [
        ("labels.txt", "ants\nbees\n", ANTS),
        ("labels.txt", "\ufeffants\r\nbees", ANTS),
        ("labels.txt", "0 ants\n1 bees\n", ANTS),
        ("labels.txt", "2: bees\n1: ants\n", ANTS),
        # These numbers belong to the names.
        ("labels.txt", "3 series\n5 series\n", ("3 series", "5 series")),
        ("labels.txt", "1 cent\n2 cent\n", ("1 cent", "2 cent")),
        ("labels.json", '["ants", "bees"]', ANTS),
        ("labels.json", '{"1": "bees", "0": "ants"}', ANTS),
        ("labels.json", '{"01": "ants", "02": "bees"}', ANTS),
        ("labels.json", '{"00": "ants", "01": "bees"}', ANTS),
        ("labels.json", '{"bees": 1, "ants": 0}', ANTS),
        ("labels.json", '{"0": ["n1", "ants"], "1": ["n2", "bees"]}', ANTS),
        ("config.json", '{"id2label": {"0": "ants", "1": "bees"}, "label2id": {"x": 0}, "layers": [1]}', ANTS),
        ("classes.json", '{"epoch": 3, "class_to_idx": {"ants": 0, "bees": 1}}', ANTS),
        ("data.yaml", "nc: 2\nnames: [ants, bees]\n", ANTS),
        ("data.yaml", "names:\n  1: bees\n  0: ants\n", ANTS),
        ("data.yml", "names: [no, 'yes']\n", ("no", "yes")),
        ("labels.csv", "id,name\n1,bees\n0,ants\n", ANTS),
        ("labels.csv", 'name,id\n"bees, honey",1\nants,0\n', ("ants", "bees, honey")),
        ("labels.csv", "ants\nbees\n", ANTS),
        ("labels.tsv", "0\tants\n1\tbees\n", ANTS),
        ("labels.csv", "id;name\n1;bees\n0;ants, red\n", ("ants, red", "bees")),
        ("labels.tsv", "name\tid\nbees\t1\nants\t0\n", ANTS),
        ("labels.txt", "bees 1\nants 0\n", ANTS),
        ("labels.txt", "1) bees\n0) ants\n", ANTS),
        ("labels.txt", "1 - bees\n0 - ants\n", ANTS),
        ("labels.txt", "{1: 'bees', 0: \"ant's\"}", ("ant's", "bees")),
        ("labels.yaml", "{0: ants, 1: bees}", ANTS),
        ("classes.json", '{"class_to_idx": {"1": 0, "10": 1, "2": 2}}', ("1", "10", "2")),
        ("classes.yaml", "class_to_idx: {3: 0, 7: 1}", ("3", "7")),
        ("config.json", '{"architecture": "resnet18", "label_names": ["ants", "bees"]}', ANTS),
        # Ordered as numbers.
        (
            "labels",
            json.dumps({str(i): f"class {i}" for i in range(12)}, sort_keys=True),
            tuple(f"class {i}" for i in range(12)),
        ),
        # Repeated names get their id or their index.
        (
            "labels",
            '{"0": ["n02012849", "crane"], "1": ["n1", "ox"], "2": ["n03126707", "crane"]}',
            ("crane (n02012849)", "ox", "crane (n03126707)"),
        ),
        ("labels", "crane\nox\ncrane\n", ("crane (0)", "ox", "crane (2)")),
    ],
)
def test_labels_have_the_order_of_the_outputs(tmp_path: Path, name: str, text: str, labels: tuple[str, ...]) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_labels(tmp_path / name) == labels


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "latin-1"])
def test_labels_are_read_in_any_of_these_encodings(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "labels").write_bytes("Käfer\nAbeille mellifère\n".encode(encoding))
    assert read_labels(tmp_path / "labels") == ("Käfer", "Abeille mellifère")


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("labels", "", "is empty"),
        ("labels", "{}", "is empty"),
        ("labels", "ants\n\nbees\n", "blank name for class 1"),
        ("labels", '["ants", " "]', "blank name for class 1"),
        ("labels", '{"0": "ants", "2": "bees"}', "none for class 1 .* class 2; number the classes 0 to 1"),
        ("labels", '{"0": "ants", "one": "bees"}', "'one', which is not a class number"),
        ("labels", '{"ants": 0, "bees": 0}', "has '0' twice; keep one"),
        ("labels", '{"0": "ants", "0": "bees"}', "has '0' twice; keep one"),
        ("labels", '{"0": "ants", "00": "bees"}', "has '0' twice; keep one"),
        ("labels", "crane\ncrane\ncrane (0)\n", r"has 'crane \(0\)' twice"),
        ("labels", '["ants", 3]', "has 3 for class 1; allowed"),
        ("labels", '["ants", [3, "bees"]]', r"has \[3, 'bees'\] for class 1; allowed"),
        ("labels", '["ants", ', "is not JSON"),
        ("data.yaml", "names: {0: ants, 0: bees}\n", "has '0' twice"),
        ("data.yaml", "names: [ants\n", "is not YAML"),
        ("data.yaml", "ants\n", "holds a str; allowed"),
        ("data.yaml", "? [a, b]\n: 0\n", "is not YAML"),
        ("labels", "[" * 9_000, "is not JSON"),
        ("labels.csv", "0,n1,ants\n1,n2,bees\n", "more than two columns"),
        ("labels.csv", "a,ants\nb,bees\n", "without class numbers"),
    ],
)
def test_labels_that_cannot_be_read_are_refused_with_their_place(
    tmp_path: Path, name: str, text: str, reason: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ArchiveError, match=f"^the labels file .*{name} .*{reason}") as caught:
        read_labels(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_missing_or_binary_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"cannot be read .*; name another"):
        read_labels(tmp_path / "none.txt")
    (tmp_path / "labels").write_bytes(b"\x81\x8d\xff")
    with pytest.raises(ArchiveError, match="save it as UTF-8"):
        read_labels(tmp_path / "labels")
