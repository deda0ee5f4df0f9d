"""Verifying: what holds is said, what a file check cannot see is found by running it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from archive.build import Built
from archive.verify import verify
from beeline.errors import ArchiveError
from beeline.spec import ModelSpec
from tests.archive.conftest import Files, MakeMar


def rebuilt(files: Files, labels: list[str]) -> Files:
    """Change the labels and everything that records them, as a whole new archive would."""
    spec = ModelSpec.from_dict({**json.loads(files["model_spec.json"]), "labels": labels})
    files = {**files, "model_spec.json": json.dumps(spec.to_dict()).encode()}
    record = json.loads(files["checksums.json"])
    record["fingerprint"] = spec.fingerprint()
    record["files"]["model_spec.json"] = hashlib.sha256(files["model_spec.json"]).hexdigest()
    return {**files, "checksums.json": json.dumps(record).encode()}


def test_a_good_archive_holds_on_both_servers_contexts(tiny_built: Built) -> None:
    for server in ("torchserve", "mms"):
        verified = verify(tiny_built.path, server)
        assert verified.pictures == 4
        assert verified.spec == tiny_built.spec
        assert verified.choice["precision"][0] == "fp32"
        assert json.dumps(verified.to_dict())


def test_shifted_labels_are_found_even_where_every_digest_agrees(tiny_files: Files, make_mar: MakeMar) -> None:
    mar = make_mar(rebuilt(tiny_files, ["bees", "crickets", "ants"]))
    with pytest.raises(ArchiveError, match=r"golden/0\.jpg is answered 'bees' .* expected 'ants'"):
        verify(mar)


def test_an_archive_that_the_index_knows_otherwise_is_refused(
    tiny_built: Built, tiny_files: Files, make_mar: MakeMar
) -> None:
    other = make_mar(dict(reversed(tiny_files.items())))
    shutil.copyfile(tiny_built.path.parent / "index.json", other.parent / "index.json")
    replaced = other.rename(other.with_name("tiny.mar"))
    with pytest.raises(ArchiveError, match=r"has sha256 .*, index\.json says .*changed after it was built"):
        verify(replaced)


def test_a_missing_archive_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="is missing"):
        verify(tmp_path / "none.mar")
