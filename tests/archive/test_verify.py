"""Verifying compares with the index; the card shows every fact and runs no code.

What only a run can find is in test_build.py and in tests/handlers/test_vision_handler.py.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from archive.build import Built, build
from archive.inspect import card
from archive.verify import verify
from beeline.errors import ArchiveError
from beeline.spec import FILE_NAME, ModelSpec
from tests.archive.conftest import LABELS, Files, MakeMar


def test_an_archive_that_differs_from_the_index_is_refused(
    tiny_built: Built, tiny_files: Files, make_mar: MakeMar
) -> None:
    other = make_mar(dict(reversed(tiny_files.items())))
    shutil.copyfile(tiny_built.path.parent / "index.json", other.parent / "index.json")
    replaced = other.rename(other.with_name("tiny.mar"))
    with pytest.raises(ArchiveError, match=r"has sha256 .*, index\.json says .*changed after it was built"):
        verify(replaced)


def test_an_archive_with_a_temperature_is_verified(tiny_export: Path, tmp_path: Path) -> None:
    """Its answers are less sure than the golden pictures say, which are recorded without it."""
    folder = Path(shutil.copytree(tiny_export, tmp_path / "export"))
    dataclasses.replace(ModelSpec.load(folder), temperature=4.0).save(folder / FILE_NAME)
    assert verify(build(folder, tmp_path / "store", check=False).path).pictures == 4


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
