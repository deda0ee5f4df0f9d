"""A fit from plan to finished run: what it leaves, that it repeats, that it never leaves half."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from beeline.errors import ArchiveError
from host import silent
from tests.conftest import ROOT
from train import runs
from train.config import load
from train.data import read
from train.errors import DataError, RunError
from train.fit import fit
from train.plan import Plan, plan
from train.predictor import RunPredictor
from train.runs import Epoch, Run


def test_a_run_holds_configuration_checkpoint_metrics_and_record(tiny_run: Run, tiny_plan: Plan) -> None:
    files = {"config.yaml", "pictures.csv", "checkpoint.pth", "metrics.csv", "metrics.json", "run.json"}
    assert {path.name for path in tiny_run.folder.iterdir()} == files
    assert load(tiny_run.folder / "config.yaml") == tiny_plan.config
    rows = list(csv.DictReader((tiny_run.folder / "metrics.csv").read_text().splitlines()))
    metrics = json.loads((tiny_run.folder / "metrics.json").read_text())
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert list(rows[0]) == [field.name for field in dataclasses.fields(Epoch)]
    assert metrics["last"] == metrics["epochs"][-1]
    assert metrics["last"]["val_accuracy"] == tiny_run.accuracy
    record = tiny_run.record
    assert record["labels"] == ["circles", "stripes"]
    assert record["data"]["train"] == {"circles": 8, "stripes": 8}
    assert record["weights"]["name"] == "squeezenet.pth"
    assert record["recipe"] == {"value": "finetune", "reason": "there are weights to start from (squeezenet.pth)"}
    assert record["device"]["reason"]


def test_the_model_on_disk_is_the_one_that_was_measured(exported: Run, tiny_plan: Plan) -> None:
    """With weight averaging on, the averaged weights are measured: they must be those on disk."""
    predictor = RunPredictor(exported.folder)
    losses = []
    for picture in tiny_plan.data.val.pictures:
        values = predictor.predict([picture.path.read_bytes()])[0].json()
        losses.append(-torch.tensor(values[exported.labels[picture.truth]]).log())
    measured = json.loads((exported.folder / "metrics.json").read_text())["last"]["val_loss"]
    assert float(torch.stack(losses).mean()) == pytest.approx(measured, rel=1e-3)


def test_the_same_plan_gives_the_same_weights(tiny_run: Run, tiny_plan: Plan, tmp_path: Path) -> None:
    torch.manual_seed(99)
    again = fit(tiny_plan, silent, tmp_path)
    first, second = (torch.load(run.checkpoint, weights_only=True) for run in (tiny_run, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert again.fingerprint == tiny_run.fingerprint


def test_a_fit_says_plain_lines_and_leaves_the_process_as_it_was(
    tiny_plan: Plan, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    before = torch.random.get_rng_state()
    config = dataclasses.replace(tiny_plan.config, fit=dataclasses.replace(tiny_plan.config.fit, epochs=1))
    fit(dataclasses.replace(tiny_plan, config=config), said.append, tmp_path)
    assert {line.split(":")[0] for line in said} == {"run", "head", "epoch 1/1"}
    assert said[-1].startswith("epoch 1/1: training loss ")
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.are_deterministic_algorithms_enabled()


def test_bf16_trains_on_a_cpu_close_to_fp32(tiny_run: Run, tiny_plan: Plan, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_plan.config, fit=dataclasses.replace(tiny_plan.config.fit, precision="bf16"))
    run = fit(dataclasses.replace(tiny_plan, config=config), silent, tmp_path)
    assert run.record["device"]["precision"] == "bf16"
    mixed, full = (json.loads((each.folder / "metrics.json").read_text())["epochs"] for each in (run, tiny_run))
    for one, other in zip(mixed, full, strict=True):
        assert one["val_loss"] != other["val_loss"]
        assert one["val_loss"] == pytest.approx(other["val_loss"], rel=0.05)


def test_from_random_weights_batch_normalisation_learns(drawn: Path, tmp_path: Path) -> None:
    words = ["fit=scratch", "fit.epochs=1", "fit.batch=8", "model.resize=72", "model.crop=64"]
    words += ["model.name=mobilenet_v3_small"]
    run = fit(plan(words, silent, environ={"BEELINE_DATA": str(drawn)}), silent, tmp_path)
    assert run.record["weights"] == {"kind": "random", "name": "none (random initialisation)", "sha256": None}
    state = torch.load(run.checkpoint, weights_only=True)
    counted = [int(value) for key, value in state.items() if key.endswith("num_batches_tracked")]
    assert counted
    assert set(counted) == {2}


def test_weights_of_another_architecture_leave_no_run(environ: dict[str, str], tmp_path: Path) -> None:
    wrong = plan(["model.name=resnet18", "model.resize=72", "model.crop=64"], silent, environ=environ)
    with pytest.raises(ArchiveError, match=r"squeezenet\.pth lacks 'conv1\.weight', which resnet18 has"):
        fit(wrong, silent, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("loaders", [0, 1])
def test_a_broken_picture_is_one_sentence_and_no_finished_run(
    tiny_plan: Plan, drawn: Path, tmp_path: Path, loaders: int
) -> None:
    folder = Path(shutil.copytree(drawn, tmp_path / "set"))
    found, picture = read(folder), folder / "train/circles/003.png"
    # After all pictures have been read once.
    picture.write_bytes(picture.read_bytes()[:-400])
    config = dataclasses.replace(tiny_plan.config, data=dataclasses.replace(tiny_plan.config.data, loaders=loaders))
    broken = dataclasses.replace(tiny_plan, data=found, config=config)
    with pytest.raises(DataError, match=r"^the picture \S*003\.png cannot be used: ") as caught:
        fit(broken, silent, tmp_path / "runs")
    assert "\n" not in str(caught.value)
    assert runs.find_run(broken.fingerprint, tmp_path / "runs") is None


def test_the_head_alone_is_a_run_whose_body_stays_and_lightning_is_not_imported(
    environ: dict[str, str], random_weights: Path, tmp_path: Path
) -> None:
    words = ["model.name=squeezenet1_1", "model.resize=72", "model.crop=64"]
    code = (
        "import sys; from pathlib import Path; from train.fit import fit; from train.plan import plan\n"
        f"fit(plan({words!r}, print, environ={environ!r}, quick=True), print, Path({str(tmp_path)!r}))\n"
        "assert 'lightning' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    (run,) = runs.finished(tmp_path)
    assert run.record["recipe"]["value"] == "head"
    last = json.loads((run.folder / "metrics.json").read_text())["last"]
    assert (last["epoch"], last["val_accuracy"]) == (0, run.accuracy)
    before, after = (torch.load(path, weights_only=True) for path in (random_weights, run.checkpoint))
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        "classifier.1.weight",
        "classifier.1.bias",
    }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_fit_is_no_finished_run(
    tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr("train.learner.Learner.on_validation_epoch_start", lambda _: signal.raise_signal(number))
    with pytest.raises(RunError, match=r"interrupted after [01] of 2 epochs; `beeline train --resume \S+` goes on"):
        fit(tiny_plan, silent, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert runs.find_run(tiny_plan.fingerprint, tmp_path) is None


@pytest.mark.train
@pytest.mark.shared
@pytest.mark.parametrize("seed", [0, 1])
def test_real_pictures_are_learnt(shared_data: Path, tmp_path: Path, seed: int) -> None:
    environ = {
        "BEELINE_DATA": str(shared_data / "hymenoptera_data"),
        "BEELINE_WEIGHTS": str(shared_data / "weights/resnet18-imagenet-pq.pth"),
    }
    planned = plan([f"seed={seed}"], silent, environ=environ, quick=seed == 0)
    # The quick one of the default seed is what `make serve` trains: a run of the same fingerprint is the same run.
    finished = runs.find_run(planned.fingerprint)
    run = runs.open_run(finished) if finished else fit(planned, silent, tmp_path)
    assert run.record["data"]["val"] == {"ants": 70, "bees": 83}
    assert run.accuracy >= 0.93


@pytest.mark.train
def test_drawn_pictures_are_learnt_from_nothing_in_small(tmp_path: Path) -> None:
    planned = plan(["fit=small"], silent, cache=tmp_path, environ={}, generated=True)
    assert fit(planned, silent, tmp_path / "runs").accuracy >= 0.85
