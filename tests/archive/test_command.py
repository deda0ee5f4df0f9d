"""`beeline archive` from a user's model file to answers, and its one-sentence errors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from archive.build import Built
from beeline.errors import ArchiveError, BeelineError
from cli.archive import app
from tests.archive.conftest import LABELS, TinyNet
from tests.conftest import RED

MakePlain = Callable[[str], Path]


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def last_json(result: Result) -> dict[str, Any]:
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    values: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return values


@pytest.fixture
def brought(tmp_path: Path) -> list[object]:
    """The words that build a user's own exported program, in a folder of its own."""
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(TinyNet().eval(), (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "mine.pt2")
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    words = ["build", "--model", tmp_path / "mine.pt2", "--labels", tmp_path / "labels.txt"]
    return [*words, "--resize", 36, "--crop", 32, "--store", tmp_path / "store"]


def test_a_model_file_becomes_an_archive_that_is_listed_and_answers(brought: list[object], tmp_path: Path) -> None:
    built = last_json(call(*brought, "--licence", "MIT", "--json"))
    assert built["name"] == "mine"
    assert built["verified"]["pictures"] == 4
    mar = tmp_path / "store" / "mine.mar"
    assert built["archive"] == str(mar)
    listed = last_json(call("list", "--store", tmp_path / "store", "--json"))
    assert [(item["file"], item["state"]) for item in listed["archives"]] == [("mine.mar", "ok")]
    shown = last_json(call("inspect", mar, "--json"))
    assert shown["spec"]["provenance"]["licence"] == "MIT"
    assert shown["spec"]["provenance"]["weights"] == "mine.pt2"
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "bad.png").write_bytes(b"none")
    ran = call("run", mar, tmp_path / "red.png", tmp_path / "bad.png", "--json")
    assert ran.exit_code == 1
    rows = last_json(ran)["pictures"]
    assert [row["status"] for row in rows] == [200, 415]
    assert set(json.loads(rows[0]["body"])) == set(LABELS)


def test_an_exported_folder_or_the_run_around_it_is_built(tiny_export: Path, tiny_built: Built, tmp_path: Path) -> None:
    for source in (tiny_export, tiny_export.parent):
        built = last_json(call("build", source, "--store", tmp_path / "store", "--no-verify", "--json"))
        assert built["sha256"] == tiny_built.sha256
        assert built["verified"] is None


def test_the_card_is_for_people_too(tiny_built: Built) -> None:
    shown = call("inspect", tiny_built.path)
    assert shown.exit_code == 0
    assert "labels       3: ants, bees, crickets" in shown.stdout


def test_verify_says_what_holds(tiny_built: Built) -> None:
    said = call("verify", tiny_built.path, "--server", "mms")
    assert said.exit_code == 0
    assert "tiny 1.0 holds; 4 golden pictures agree on cpu" in said.stdout


def test_list_fails_when_an_archive_is_not_as_it_was_built(tiny_export: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    last_json(call("build", tiny_export, "--store", store, "--no-verify", "--json"))
    (store / "tiny.mar").write_bytes(b"changed")
    listed = call("list", "--store", store)
    assert listed.exit_code == 1
    assert "tiny.mar  changed" in listed.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "neither a folder nor --model is given"),
        (["runs/x", "--model", "m.pt"], "both a folder and --model are given"),
        (["no/such/run"], "holds no exported model"),
        (["--model", "m.pt"], "add --labels FILE"),
    ],
)
def test_a_build_without_its_input_is_one_sentence(words: list[str], told: str) -> None:
    result = call("build", *words)
    assert isinstance(result.exception, BeelineError)
    assert told in str(result.exception)


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (["--mean", "1,x,2"], "--mean is '1,x,2'"),
        (["--preset", "imagnet"], "did you mean 'imagenet'"),
        (["--output", "logit"], "output is 'logit'"),
        (["--name", "my model"], "name is 'my model'"),
        (["--crop", "0"], "geometry.crop is 0"),
    ],
)
def test_a_wrong_option_names_its_value(brought: list[object], extra: list[str], told: str) -> None:
    result = call(*brought, *extra)
    assert isinstance(result.exception, BeelineError), result.exception
    assert told in str(result.exception)


def test_labels_of_the_wrong_length_say_both_numbers(brought: list[object], tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("ants\nbees\n")
    result = call(*brought)
    assert isinstance(result.exception, ArchiveError)
    assert "3 outputs and there are 2 labels" in str(result.exception)


def test_run_shows_the_handlers_own_traceback(make_plain: MakePlain, tmp_path: Path) -> None:
    mar = make_plain("class A:\n    def initialize(self, context):\n        return 1 / 0\n")
    (tmp_path / "red.png").write_bytes(RED)
    result = call("run", mar, tmp_path / "red.png")
    assert isinstance(result.exception, ArchiveError)
    assert "ZeroDivisionError" in str(result.exception)
    assert 'plain.py", line 3, in initialize' in result.stderr


def test_the_command_imports_no_torch_until_it_is_called() -> None:
    program = "import sys, cli.archive; sys.exit(sorted({'torch', 'archive', 'numpy'} & set(sys.modules)) or 0)"
    subprocess.run([sys.executable, "-c", program], check=True)
