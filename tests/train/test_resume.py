"""An interrupted fit goes on as if nothing had happened: after a kill, a second one, and on a full disk."""

from __future__ import annotations

import dataclasses
import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from host import silent
from tests.conftest import ROOT
from train import runs
from train.errors import RunError
from train.fit import fit
from train.plan import Plan, plan, resumed
from train.runs import Run

WORDS = ["model.name=squeezenet1_1", "model.resize=72", "model.crop=64", "fit.epochs=3", "fit.batch=6"]
# Kills itself in the second batch of an epoch, as a machine that loses its power.
KILLED = """
import os, signal, sys, torch
from pathlib import Path
from host import silent
from train import cache, learner, runs
from train.fit import fit
from train.plan import plan
torch.set_num_threads(1)
epoch, folder, words, environ = int(sys.argv[1]), Path(sys.argv[2]), eval(sys.argv[3]), eval(sys.argv[4])
cache.FOLDER = folder / "pictures"
step = learner.Learner.training_step
def killed(self, batch, index):
    if (self.current_epoch, index) == (epoch, 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, index)
learner.Learner.training_step = killed
planned = plan(words, silent, environ=environ)
fit(planned, silent, folder, runs.find_unfinished(planned.fingerprint, folder))
"""


def metrics(run: Path) -> list[dict[str, float]]:
    rows = json.loads((run / "metrics.json").read_text())["epochs"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def planned(environ: dict[str, str]) -> Plan:
    return plan(WORDS, silent, environ=environ)


@pytest.fixture(scope="module")
def whole(planned: Plan, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fit(planned, silent, tmp_path_factory.mktemp("whole"))


def test_after_two_kills_in_an_epoch_the_last_digit_is_the_same(
    environ: dict[str, str], planned: Plan, whole: Run, tmp_path: Path
) -> None:
    for epoch in (1, 2):
        words = [sys.executable, "-c", KILLED, str(epoch), str(tmp_path), repr(WORDS), repr(environ)]
        assert subprocess.run(words, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
        (folder,) = (path for path in tmp_path.iterdir() if path.name != "pictures")
        assert metrics(folder) == metrics(whole.folder)[:epoch]
        assert not (folder / "run.json").exists()
    said: list[str] = []
    run = fit(resumed(folder, silent, environ=environ), said.append, tmp_path, folder)
    assert said[0] == f"run: {folder}, which was interrupted, goes on"
    assert said[1].startswith("epoch 3/3: "), "what was trained is not trained again"
    assert metrics(run.folder) == metrics(whole.folder)
    first, second = (torch.load(each.checkpoint, weights_only=True) for each in (whole, run))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.folder.iterdir()}
    assert run.record["fingerprint"] == whole.fingerprint == planned.fingerprint


def test_on_a_full_disk_the_checkpoint_before_stays_good(planned: Plan, whole: Run, tmp_path: Path) -> None:
    """The limit of a file's size stands for the disk: writing fails in the middle with an error of the system."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(text: str) -> None:
        if text.startswith("epoch 2/3"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))

    try:
        with pytest.raises(RunError, match=r"checkpoint of epoch 2 cannot be written .*that of epoch 1 is kept; make"):
            fit(planned, full, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (folder,) = tmp_path.iterdir()
    assert [path.name for path in folder.iterdir() if path.suffix == ".tmp"] == []
    assert runs.find_unfinished(planned.fingerprint, tmp_path) == folder
    assert metrics(fit(planned, silent, tmp_path, folder).folder) == metrics(whole.folder)


def test_a_fit_that_ended_after_its_last_epoch_keeps_that_network(
    planned: Plan, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("train.fit.write_state", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            fit(planned, silent, tmp_path)
    (folder,) = tmp_path.iterdir()
    run = fit(planned, silent, tmp_path, folder)
    first, second = (torch.load(each.checkpoint, weights_only=True) for each in (whole, run))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_what_cannot_be_resumed_says_why(
    planned: Plan, whole: Run, environ: dict[str, str], tmp_path: Path, random_weights: Path
) -> None:
    with pytest.raises(RunError, match=r"the run \S+ is finished; train without --resume"):
        resumed(whole.folder, silent, environ=environ)
    with pytest.raises(RunError, match=r"cannot be resumed \(no planned\.json of it can be read\)"):
        resumed(tmp_path, silent, environ=environ)

    def stop(text: str) -> None:
        if text.startswith("epoch 1/3"):
            with pytest.raises(RunError, match="is being trained by another process"):
                resumed(next(tmp_path.iterdir()), silent, environ=environ)
            assert runs.find_unfinished(planned.fingerprint, tmp_path) is None
        if text.startswith("epoch 2/3"):
            raise KeyboardInterrupt

    with pytest.raises(RunError, match=r"interrupted after [12] of 3 epochs; `beeline train --resume \S+` goes on"):
        fit(planned, stop, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert resumed(folder, silent, environ=environ).fingerprint == planned.fingerprint
    values = json.loads((folder / "planned.json").read_text())
    (folder / "planned.json").write_text(json.dumps(values | {"fingerprint": "0" * 64}))
    with pytest.raises(RunError, match="its pictures, weights, packages or Beeline's code have changed since"):
        resumed(folder, silent, environ=environ)


def test_the_best_epoch_for_the_watched_pictures_is_kept_and_they_are_training_pictures(
    planned: Plan, tmp_path: Path
) -> None:
    """A rate that wrecks the network: what comes after the first epochs is worse."""
    fitted = dataclasses.replace(planned.config.fit, rate=1.0, epochs=9, average=None)
    schedule = dataclasses.replace(planned.config.schedule, patience=2, watched=0.25, shape="constant")
    config = dataclasses.replace(planned.config, fit=fitted, schedule=schedule)
    said: list[str] = []
    run = fit(dataclasses.replace(planned, config=config), said.append, tmp_path)
    values = json.loads((run.folder / "metrics.json").read_text())
    losses = [row["watched_loss"] for row in values["epochs"]]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 9
    assert said[-1] == f"stopped: the watched pictures got no better for 2 epochs; epoch {best + 1} is kept"
    assert values["last"]["epoch"] == best + 1
    assert run.accuracy == values["last"]["val_accuracy"]
    listed = (run.folder / "pictures.csv").read_text().splitlines()[1:]
    assert [line.partition(",")[0] for line in listed].count("watched") == 4
    assert [line.partition(",")[0] for line in listed].count("val") == len(planned.data.val)
