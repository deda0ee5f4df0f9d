"""Several processes train as one: the same metrics, each picture once, one run; after a kill and on two machines."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from beeline.errors import ConfigError
from host import silent
from tests.conftest import ROOT
from train import parallel
from train.fit import fit
from train.loader import Draws, Pictures
from train.model import build
from train.plan import Plan, plan

WORDS = ["model.name=shufflenet_v2_x0_5", "model.resize=72", "model.crop=64", "fit.batch=6", "fit.epochs=4"]
# Trains, and exports nothing.
PART = """
import sys
from pathlib import Path
from host import silent
from train import parallel, runs
from train.fit import fit, follow
from train.plan import plan
parallel.join()
if parallel.rank():
    follow()
else:
    folder, planned = Path(sys.argv[1]), plan(sys.argv[2:], silent, environ={})
    fit(planned, lambda text: print(text, flush=True), folder, runs.find_unfinished(planned.fingerprint, folder))
"""


@pytest.fixture(scope="module")
def words(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """15 training and 7 validation pictures, so that neither half, nor the last batch, can be shared equally."""
    folder = Path(shutil.copytree(drawn, tmp_path_factory.mktemp("odd") / "set"))
    for picture in ("train/circles/000.png", "val/circles/000.png"):
        (folder / picture).unlink()
    weights = folder.parent / "weights.pth"
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        network = build("shufflenet_v2_x0_5", 1000).train()
        for _ in range(30):
            # Statistics with which random features differ from picture to picture.
            network(torch.rand(8, 3, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3) * 4 - 2)
        torch.save(network.state_dict(), weights)
    return [*WORDS, "fit.class_weights=balanced", f"data.folder={folder}", f"model.weights={weights}", "data.cache=0"]


@pytest.fixture(scope="module")
def planned(words: list[str]) -> Plan:
    return plan(words, silent, environ={})


def start(*words: str) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)


def rows(run: Path) -> list[dict[str, float]]:
    values: list[dict[str, float]] = json.loads((run / "metrics.json").read_text())["epochs"]
    return [{key: value for key, value in row.items() if key != "seconds" and value is not None} for row in values]


def test_two_processes_that_are_killed_and_resumed_as_two_machines_have_the_metrics_of_one(
    words: list[str], planned: Plan, tmp_path: Path
) -> None:
    one, runs, script = fit(planned, silent, tmp_path / "one"), tmp_path / "two", tmp_path / "part.py"
    script.write_text(PART)
    first = start("torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), str(runs), *words)
    while first.poll() is None and not list(runs.glob("*/last.ckpt")):
        time.sleep(0.01)
    for each in psutil.Process(first.pid).children(recursive=True):
        each.kill()
    said, _ = first.communicate(timeout=60)
    assert (first.returncode != 0, said.count("epoch 1/4: training loss")) == (True, 1), "only the leader speaks"
    (run,) = runs.iterdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    where = ["torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1"]
    where += [f"--master-port={port}", "--node-rank"]
    nodes = [start(*where, number, str(script), str(runs), *words) for number in ("0", "1")]
    (said, errors), (silence, more) = (each.communicate(timeout=300) for each in nodes)
    assert [each.returncode for each in nodes] == [0, 0], errors + more
    assert f"run: {run}, which was interrupted, goes on" in said
    assert (said.count("epoch 4/4: training loss"), silence) == (1, "")
    assert 0.5 < one.accuracy < 1, "nothing to compare"
    # With class weights, training losses are means of each process' own weighted means; nothing depends on them.
    got, wanted = rows(run), rows(one.folder)
    for row, other in zip(got, wanted, strict=True):
        assert row.pop("train_loss") == pytest.approx(other.pop("train_loss"), rel=0.01)
        assert row == pytest.approx(other, rel=1e-4), "only the order of sums differs"
    assert {path.name for path in run.iterdir() if path.suffix != ".tmp"} == {
        path.name for path in one.folder.iterdir()
    }


def test_a_mistake_is_one_sentence_of_the_first_process(words: list[str], tmp_path: Path) -> None:
    process = start("cli", "train", *words, "fit.batch=7", "--runs", str(tmp_path), "--processes", "2")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 1
    assert said.splitlines()[-1] == "beeline: fit.batch is 7, which 2 processes cannot share; take a multiple of 2"
    assert (said.count("fit.batch"), said.count("elastic"), list(tmp_path.iterdir())) == (1, 0, [])


def test_fewer_validation_pictures_than_processes_are_refused(
    planned: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "size", lambda: 3)
    few = replace(planned.data.val, pictures=planned.data.val.pictures[:2])
    with pytest.raises(ConfigError, match="2 validation pictures cannot be shared by 3 processes"):
        fit(replace(planned, data=replace(planned.data, val=few)), silent, tmp_path)


def test_a_process_that_is_killed_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(words: list[str]) -> None:
        raise ChildFailedError("cli", {0: ProcessFailure(0, 1, -9, "no file")})

    monkeypatch.setattr("torch.distributed.run.main", main)
    assert parallel.launch(2) == 1


@pytest.mark.parametrize(("count", "batch", "processes"), [(15, 6, 3), (13, 6, 2), (14, 6, 3), (13, 6, 1), (8, 4, 4)])
def test_a_batch_of_each_process_makes_the_whole_one_and_each_has_a_picture_of_the_last(
    planned: Plan, monkeypatch: pytest.MonkeyPatch, count: int, batch: int, processes: int
) -> None:
    draws, own = list(Draws(count, 3)), list[list[list[tuple[int, int]]]]()
    train = replace(planned.data.train, pictures=(planned.data.train.pictures * 2)[:count])
    config = replace(planned.config, fit=replace(planned.config.fit, batch=batch), seed=3)
    monkeypatch.setattr(parallel, "size", lambda: processes)
    for rank in range(processes):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        loader = Pictures(replace(planned.data, train=train), config).train_dataloader()
        own.append(list(loader.batch_sampler))  # type: ignore[arg-type]
        assert len(loader) == len(own[-1])
    together = [[draw for draws in zip_longest(*each) for draw in draws if draw] for each in zip(*own, strict=True)]
    assert [draw for whole in together for draw in whole] == draws
    assert min(len(each) for batches in own for each in batches) >= 1
    assert {len(whole) for whole in together[:-1]} <= {batch, batch + processes}
