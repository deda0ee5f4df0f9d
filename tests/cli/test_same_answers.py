"""One trained model as a run, as an archive and on every server: the same answers, also for awkward pictures."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from archive.build import build
from archive.mar import MANIFEST
from archive.sandbox import Sandbox
from beeline import pixels
from beeline.answer import Answer
from cli.sources import open_source
from serve.addresses import Ports
from serve.config import Overrides
from serve.instance.child import Running
from serve.up import Request, up
from tests.conftest import ROOT, post_as_one_batch
from train.export import network
from train.model import normalised
from train.runs import open_run

pytestmark = [pytest.mark.shared, pytest.mark.server]


@pytest.fixture(scope="module")
def trained(shared_data: Path) -> Path:
    """The run on the real pictures: trained here, or by an earlier test with the same configuration."""
    weights = shared_data / "weights" / "resnet18-imagenet-pq.pth"
    words = ["train", "--reuse", "--data", str(shared_data / "hymenoptera_data"), "--weights", str(weights), "--json"]
    # It may train for minutes, for longer than `beeline` of the other tests waits.
    done = subprocess.run([sys.executable, "-m", "cli", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Path(json.loads(done.stdout.splitlines()[-1])["run"])


@pytest.fixture(scope="module")
def mar(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(trained / "export", tmp_path_factory.mktemp("store")).path


@pytest.fixture(scope="module", params=["torchserve", "mms", "litserve", "triton"])
def running(mar: Path, request: pytest.FixtureRequest) -> Iterator[Running]:
    overrides = Overrides(batch_size=8, workers=1, max_batch_delay=1000)
    name = f"same-{request.param}"
    asked = Request(request.param, store=mar.parent, name=name, overrides=overrides, ports=Ports(0))
    with up(asked, print) as server:
        yield server


@pytest.fixture(scope="module")
def photographs(shared_data: Path) -> list[bytes]:
    paths = sorted((shared_data / "hymenoptera_data" / "val").glob("*/*.jp*g"))
    assert len(paths) == 153
    return [path.read_bytes() for path in paths]


@pytest.fixture(scope="module")
def awkward(shared_data: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((shared_data / "awkward").rglob("*.*"))]


def outcomes(answers: list[Answer]) -> list[str | int]:
    """Return each answer's first label, or its status where it has none."""
    return [str(next(iter(one.json()))) if one.status == 200 else one.status for one in answers]


def worker(running: Running) -> psutil.Process:
    assert running.state.server_process is not None
    children = psutil.Process(running.state.server_process).children(recursive=True)
    workers = [child for child in children if (Path(child.cwd()) / MANIFEST).is_file()]
    # Multi Model Server's worker forks the one that answers.
    (found,) = [one for one in workers if not any(other.ppid() == one.pid for other in workers)]
    return found


@pytest.fixture(scope="module")
def of_the_run(trained: Path, photographs: list[bytes]) -> list[str]:
    run = open_run(trained)
    model, trained_network, found = run.config().model, network(run), []
    with torch.inference_mode():
        for data in photographs:
            crop = torch.from_numpy(np.array(pixels.decode(data, model.geometry))).permute(2, 0, 1)
            found.append(run.labels[int(trained_network(normalised(crop[None], model.mean, model.std)).argmax())])
    return found


@pytest.fixture(scope="module")
def of_the_archive(mar: Path, photographs: list[bytes], awkward: list[bytes]) -> list[str | int]:
    with Sandbox(mar) as sandbox:
        return outcomes(sandbox.predict([*photographs, *awkward]))


def test_the_archive_agrees_with_the_run(of_the_archive: list[str | int], of_the_run: list[str]) -> None:
    assert of_the_archive[: len(of_the_run)] == of_the_run


def test_the_server_agrees_with_the_run(running: Running, photographs: list[bytes], of_the_run: list[str]) -> None:
    with open_source(running.state.inference, "resnet18") as opened:
        assert outcomes(opened.predict(photographs)) == of_the_run


def test_awkward_pictures_in_batches_with_photographs_harm_nobody(
    running: Running, photographs: list[bytes], awkward: list[bytes], of_the_archive: list[str | int]
) -> None:
    """Each awkward picture once; tests/handlers/test_over_http.py has small pictures in more placements."""
    answers = list(zip([*photographs, *awkward], of_the_archive, strict=True))
    choose, before = random.Random(7), worker(running)
    sent = answers[len(photographs) :]
    assert {status for _, status in sent} >= {400, 413, 415, 422}
    sent += choose.sample(answers[: len(photographs)], 40 + -len(sent) % 8)
    choose.shuffle(sent)
    url = f"{running.state.inference}/predictions/resnet18"
    for start in range(0, len(sent), 8):
        batch = sent[start : start + 8]
        post_as_one_batch(url, [data for data, _ in batch], [expected for _, expected in batch])
    assert worker(running).pid == before.pid
