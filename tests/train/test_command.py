"""`beeline train` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from archive import inspect
from beeline.errors import ArchiveError, BeelineError, ConfigError
from beeline.spec import ModelSpec
from cli.train import train
from train.errors import DataError

app = typer.Typer()
app.command()(train)


def call(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def test_a_run_is_trained_exported_and_reused(drawn: Path, random_weights: Path, tmp_path: Path) -> None:
    named = Path(tmp_path / "it's a, set=1")
    named.symlink_to(drawn)
    words = ["model.name=squeezenet1_1", "model.resize=72", "model.crop=64", "fit.epochs=1", "export.name=shapes"]
    options = ["--data", str(named), "--weights", str(random_weights), "--seed", "3", "--runs", str(tmp_path / "runs")]
    first = call(*words, *options, "--json", "--safetensors", str(tmp_path / "trained.safetensors"))
    assert first.exit_code == 0, first.output
    values = json.loads(first.stdout.splitlines()[-1])
    assert (values["seed"], values["pictures"], values["reused"]) == (3, 8, False)
    assert values["weights"] == "squeezenet.pth"
    spec = ModelSpec.load(Path(values["export"]))
    assert (spec.name, spec.fingerprint()) == ("shapes", values["model_fingerprint"])
    assert "epoch 1/1: training loss" in first.stderr
    assert "Tip" not in first.output
    saved, checkpoint = load_file(tmp_path / "trained.safetensors"), torch.load(Path(values["run"]) / "checkpoint.pth")
    assert saved.keys() == checkpoint.keys()
    assert all(torch.equal(saved[name], checkpoint[name]) for name in saved)

    again = call(*words, *options, "--reuse")
    assert again.exit_code == 0, again.output
    assert f"nothing changed since the run {Path(values['run']).name}" in again.stderr
    assert "accuracy" in again.stdout
    assert again.stdout.splitlines()[-1] == f"next: beeline archive build {values['run']}"
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_a_quick_run_becomes_an_archive_at_once_until_there_is_a_run_of_all_epochs(
    drawn: Path, random_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archive.store.STORE", tmp_path / "store")
    words = ["model.name=squeezenet1_1", "model.resize=72", "model.crop=64", "--reuse", "--json"]
    words += ["--data", str(drawn), "--weights", str(random_weights), "--runs", str(tmp_path / "runs")]
    values = []
    for more in (["--quick", "--archive"], ["--quick", "--archive"], ["export.name=whole"], ["--quick"]):
        done = call(*words, *more)
        assert done.exit_code == 0, done.output
        values.append(json.loads(done.stdout.splitlines()[-1]))
    quick, again, whole, taken = values
    assert quick["recipe"] == "quick: only the head was fitted, on frozen features"
    card = Path(quick["archive"]["archive"])
    assert dict(inspect.card(card).rows())["recipe"] == quick["recipe"]
    assert [each["archive"]["reused"] for each in (quick, again)] == [False, True]
    assert (again["run"], again["archive"]["sha256"]) == (quick["run"], quick["archive"]["sha256"])
    assert whole["recipe"] is None
    assert (taken["run"], taken["reused"], taken["recipe"]) == (whole["run"], True, None)


@pytest.mark.parametrize(
    ("words", "error", "sentence"),
    [
        (["model.nmae=x"], ConfigError, r"unknown key model\.nmae; did you mean"),
        (["--safetensors", "/missing/x"], BeelineError, "--safetensors is /missing/x, whose folder is missing"),
        (["--data", "/missing", "--generated"], ConfigError, "generated pictures and a folder of pictures are both"),
        (["data.folder=/missing", "--generated"], ConfigError, "leave one out"),
        (["--data", "/missing"], DataError, r"the data folder /missing is missing"),
        (["--data", "DRAWN", "--golden", "/missing"], ArchiveError, "golden pictures /missing is missing"),
        (["--data", "DRAWN", "--blind-to", "exf"], ArchiveError, "did you mean 'exif'"),
        (["--data", "DRAWN", "export.name=_model"], ConfigError, "export.name is '_model'; allowed: null, or 1"),
    ],
)
def test_a_mistake_is_one_sentence_before_the_training(
    words: list[str], error: type[Exception], sentence: str, drawn: Path, tmp_path: Path
) -> None:
    named = (str(drawn) if word == "DRAWN" else word for word in words)
    done = call(*named, "fit=scratch", "--runs", str(tmp_path / "runs"))
    assert isinstance(done.exception, error), done.output
    assert not (tmp_path / "runs").exists()
    assert sentence.replace("\\", "") in str(done.exception)
