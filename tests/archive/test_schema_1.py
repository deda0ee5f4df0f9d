"""An archive from before geometry had a version, kept as it was built: every command takes it, and so do both servers.

How they serve it is tested in `tests/handlers/test_over_http.py`.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from archive import mar
from beeline.errors import ArchiveError
from cli.main import app
from tests.archive.conftest import MakeMar

OLD = Path(__file__).with_name("schema-1.mar")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its golden pictures in folders of the labels that it is to answer."""
    folder = tmp_path_factory.mktemp("labelled")
    with zipfile.ZipFile(OLD) as archive:
        for picture in json.loads(archive.read("golden/expected.json"))["pictures"]:
            place = folder / picture["top"][0][0] / picture["file"]
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(archive.read(f"golden/{picture['file']}"))
    return folder


def said(*words: object) -> dict[str, Any]:
    """Run a command, and return the JSON object on its last line."""
    done = CliRunner().invoke(app, [*map(str, words), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values


def test_it_verifies() -> None:
    assert said("archive", "verify", OLD, "--server", "mms")["pictures"] == 4


def test_its_card_shows_the_digest_in_place_of_the_version() -> None:
    card = said("archive", "inspect", OLD)
    assert (card["spec"]["schema"], len(card["spec"]["geometry_sha256"])) == (1, 64)
    assert "geometry_version" not in card["spec"]


def test_it_predicts_and_evaluates(labelled: Path) -> None:
    assert said("evaluate", OLD, "--data", labelled)["top1"] == 1
    (picture, *_) = sorted((labelled / "ants").iterdir())
    assert "ants" in json.dumps(said("predict", "--mar", OLD, picture))


def test_changed_geometry_code_is_refused_even_where_its_record_agrees(make_mar: MakeMar) -> None:
    with zipfile.ZipFile(OLD) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    files["beeline/pixels.py"] += b"# changed\n"
    record = json.loads(files["checksums.json"])
    record["files"]["beeline/pixels.py"] = hashlib.sha256(files["beeline/pixels.py"]).hexdigest()
    files["checksums.json"] = json.dumps(record).encode()
    with pytest.raises(ArchiveError, match=r"beeline/pixels\.py has sha256 .* build it again"):
        mar.check(make_mar(files))
