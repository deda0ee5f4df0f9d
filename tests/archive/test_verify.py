"""Verifying finds what a check of the files cannot see; the card shows every fact and runs no code."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest

from archive.build import Built
from archive.inspect import card
from archive.verify import verify
from beeline.errors import ArchiveError
from beeline.spec import ModelSpec
from tests.archive.conftest import LABELS, Files, MakeMar


def with_labels(files: Files, labels: list[str]) -> Files:
    spec = ModelSpec.from_dict({**json.loads(files["model_spec.json"]), "labels": labels})
    files = {**files, "model_spec.json": json.dumps(spec.to_dict()).encode()}
    record = json.loads(files["checksums.json"])
    record["fingerprint"] = spec.fingerprint()
    record["files"]["model_spec.json"] = hashlib.sha256(files["model_spec.json"]).hexdigest()
    return {**files, "checksums.json": json.dumps(record).encode()}


def test_a_good_archive_holds_on_both_servers_contexts(tiny_built: Built) -> None:
    for server in ("torchserve", "mms"):
        verified = verify(tiny_built.path, server)
        assert (verified.pictures, verified.spec) == (4, tiny_built.spec)
        assert verified.choice["precision"][0] == "fp32"
        assert json.dumps(verified.to_dict())


def test_shifted_labels_are_found_even_where_every_digest_agrees(tiny_files: Files, make_mar: MakeMar) -> None:
    mar = make_mar(with_labels(tiny_files, ["bees", "crickets", "ants"]))
    with pytest.raises(ArchiveError, match=r"golden/0\.jpg is answered 'bees' .* expected 'ants'"):
        verify(mar)


def test_an_archive_that_differs_from_the_index_is_refused(
    tiny_built: Built, tiny_files: Files, make_mar: MakeMar
) -> None:
    other = make_mar(dict(reversed(tiny_files.items())))
    shutil.copyfile(tiny_built.path.parent / "index.json", other.parent / "index.json")
    replaced = other.rename(other.with_name("tiny.mar"))
    with pytest.raises(ArchiveError, match=r"has sha256 .*, index\.json says .*changed after it was built"):
        verify(replaced)


def test_the_card_holds_every_fact_as_lines_and_as_json(tiny_built: Built) -> None:
    facts = card(tiny_built.path)
    rows = dict(facts.rows())
    assert rows["model"] == "tiny 1.0, tiny"
    assert rows["labels"] == "3: ants, bees, crickets"
    assert rows["input"] == "shorter side to 36, middle 32 x 32, bilinear"
    assert rows["engine"] == "torch, fp32, exported program"
    assert (rows["licence"], rows["accuracy"]) == ("MIT", "not measured")
    assert rows["golden"].startswith("4 pictures within 0.02: ants 0.")
    assert rows["they notice"] == "labels, channels, normalisation, exif, geometry"
    assert rows["sha256"] == tiny_built.sha256
    values = json.loads(json.dumps(facts.to_dict()))
    assert values["spec"]["labels"] == list(LABELS)
    assert values["fingerprint"] == tiny_built.spec.fingerprint()
    assert values["handler"]["file"] == "vision_handler.py"
    assert len(values["golden"]["pictures"]) == 4
    assert set(values["parts"]) == {"model", "handler", "golden", "other"}
    assert 0 < sum(values["parts"].values()) < values["bytes"]
