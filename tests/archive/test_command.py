"""`beeline archive`: from a user's model file to answers, and errors of one sentence."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from archive.build import Built
from beeline.errors import ArchiveError, BeelineError
from cli import archive, main
from tests.archive.conftest import LABELS, MakePlain, tiny_program
from tests.conftest import RED

OLD = Path(__file__).with_name("schema-1.mar")


def call(*words: object, app: typer.Typer = archive.app) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def last_json(result: Result) -> dict[str, Any]:
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    values: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return values


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own exported program."""
    path = tmp_path_factory.mktemp("mine") / "mine.pt2"
    torch.export.save(tiny_program(), path)
    return path


@pytest.fixture
def build(mine: Path, tmp_path: Path) -> list[object]:
    """The words of the command that builds it."""
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    words = ["build", "--model", mine, "--labels", tmp_path / "labels.txt"]
    return [*words, "--resize", 36, "--crop", 32, "--store", tmp_path / "store"]


def test_a_model_file_becomes_an_archive_that_is_listed_and_answers(build: list[object], tmp_path: Path) -> None:
    built = last_json(call(*build, "--licence", "MIT", "--json"))
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
        options = ["--store", tmp_path / "store", "--engine", "torch", "--no-verify", "--json"]
        built = last_json(call("build", source, *options))
        assert built["sha256"] == tiny_built.sha256
        assert built["verified"] is None


def test_an_unchanged_archive_of_the_default_engine_is_kept(tiny_export: Path, tmp_path: Path) -> None:
    words = ["build", tiny_export, "--store", tmp_path / "store", "--reuse", "--json"]
    first, again = last_json(call(*words)), last_json(call(*words))
    assert [built["reused"] for built in (first, again)] == [False, True]
    assert first["measured"].keys() == {"openvino fp32", "torch fp32"}
    assert {built["sha256"] for built in (first, again)} == {first["sha256"]}
    assert (again["engine"], again["precision"], again["verified"]) == ("openvino", "fp32", None)


def test_inspect_and_verify_also_answer_in_text(tiny_built: Built) -> None:
    assert "labels       3: ants, bees, crickets" in call("inspect", tiny_built.path).stdout
    verified = call("verify", tiny_built.path, "--server", "mms")
    assert verified.exit_code == 0
    assert "tiny 1.0 holds; 4 golden pictures agree on cpu" in verified.stdout


def test_list_fails_when_an_archive_is_not_as_it_was_built(tiny_export: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    last_json(call("build", tiny_export, "--store", store, "--no-verify", "--json"))
    (store / "tiny.mar").write_bytes(b"changed")
    listed = call("list", "--store", store)
    assert listed.exit_code == 1
    assert "tiny.mar  changed" in listed.stdout


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "neither a source nor --model is given"),
        (["runs/x", "--model", "m.pt"], "both a source and --model are given"),
        (["no/such/run"], "holds no exported model"),
        (["--model", "m.pt"], "add --labels FILE"),
        (
            ["x", "--task", "caption", "--top-k", "2"],
            "--top-k is given with --task caption, and is an option of --model",
        ),
        (["--task", "caption", "--model", "m.pt"], "leave it out, and name a checkpoint as the source"),
        (["x.mar", "--beams", "2"], "--beams is given with --model, and is an option of --task caption; leave it out"),
        (["runs/x", "--prompt", "a"], "--prompt is given with the exported folder runs/x"),
        (["runs/x", "--name", "a"], "or use --model or --task caption"),
    ],
)
def test_a_build_without_its_input_is_one_sentence(words: list[str], reason: str) -> None:
    result = call("build", *words)
    assert isinstance(result.exception, BeelineError)
    assert reason in str(result.exception)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (["--mean", "1,x,2"], "--mean is '1,x,2'"),
        (["--preset", "imagnet"], "did you mean 'imagenet'"),
        (["--output", "logit"], "output is 'logit'"),
        (["--name", "my model"], "the model's name is 'my model'; allowed: 1 to 128 letters, digits"),
        (["--name", "m" * 129], "first a letter or digit; give another with --name"),
        (["--version", "1 beta"], "the model's version is '1 beta'; allowed: 1 to 128"),
        (["--crop", "0"], "geometry.crop is 0"),
        (["--labels", "two.txt"], "3 outputs and there are 2 labels"),
    ],
)
def test_a_wrong_option_names_its_value(
    build: list[object], extra: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("two.txt").write_text("ants\nbees\n")
    result = call(*build, *extra)
    assert isinstance(result.exception, BeelineError), result.exception
    assert reason in str(result.exception)


def test_run_shows_the_handlers_own_traceback(make_plain: MakePlain, tmp_path: Path) -> None:
    mar = make_plain("class A:\n    def initialize(self, context):\n        return 1 / 0\n")
    (tmp_path / "red.png").write_bytes(RED)
    result = call("run", mar, tmp_path / "red.png")
    assert isinstance(result.exception, ArchiveError)
    assert "ZeroDivisionError" in str(result.exception)
    assert 'plain.py", line 3, in initialize' in result.stderr


def test_an_archive_of_schema_1_verifies_and_its_card_shows_the_digest_of_the_geometry_code() -> None:
    assert last_json(call("verify", OLD, "--server", "mms", "--json"))["pictures"] == 4
    card = last_json(call("inspect", OLD, "--json"))
    assert (card["spec"]["schema"], len(card["spec"]["geometry_sha256"])) == (1, 64)
    assert "geometry_version" not in card["spec"]


def test_an_archive_of_schema_1_is_evaluated(tmp_path: Path) -> None:
    with zipfile.ZipFile(OLD) as mar:
        for picture in json.loads(mar.read("golden/expected.json"))["pictures"]:
            place = tmp_path / picture["top"][0][0] / picture["file"]
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(mar.read(f"golden/{picture['file']}"))
    assert last_json(call("evaluate", OLD, "--data", tmp_path, "--json", app=main.app))["top1"] == 1
