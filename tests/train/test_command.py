"""`beeline train` as it is typed."""

from __future__ import annotations

import json
import signal
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
from train.errors import DataError, RunError

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


@pytest.mark.parametrize("named", [False, True])
def test_an_interrupted_run_goes_on_by_the_same_command_or_by_its_id(
    drawn: Path, random_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    words = ["model.name=squeezenet1_1", "model.resize=72", "model.crop=64", "fit.epochs=2"]
    words += ["--data", str(drawn), "--weights", str(random_weights)]
    runs = ["--runs", str(tmp_path / "runs")]
    with monkeypatch.context() as patched:
        patched.setattr("train.logs.Logs.write", lambda *_: signal.raise_signal(signal.SIGINT))
        assert isinstance(call(*words, *runs).exception, RunError)
    (folder,) = (tmp_path / "runs").iterdir()
    again = call(*(["--resume", folder.name] if named else words), *runs)
    assert again.exit_code == 0, again.output
    assert f"run: {folder}, which was interrupted, goes on" in again.stderr
    assert "epoch 2/2: training loss" in again.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [folder.name]
    with pytest.raises(RunError, match="is finished; train without --resume"):
        raise call("--resume", str(folder), *runs).exception or AssertionError


@pytest.mark.parametrize(
    ("words", "error", "sentence"),
    [
        (["--resume", "x", "fit.epochs=2"], BeelineError, "--resume x trains as it was planned; leave overrides"),
        (["+experiment=dog"], ConfigError, "experiment is 'dog'; did you mean 'dogs10'"),
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
    done = call(*named, *([] if "--resume" in words else ["fit=scratch"]), "--runs", str(tmp_path / "runs"))
    assert isinstance(done.exception, error), done.output
    assert not (tmp_path / "runs").exists()
    assert sentence.replace("\\", "") in str(done.exception)
