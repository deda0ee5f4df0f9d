"""One trained model as a run, as an archive and on both servers: the same answers, and a steady worker."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
import torch

from archive.build import build
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
from train.learner import normalised
from train.runs import open_run

pytestmark = [pytest.mark.shared, pytest.mark.server]

# Batches of broken and good pictures; tests/handlers/test_over_http.py sends small ones in many more placements.
BATCHES = 5


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


@pytest.fixture(scope="module", params=["torchserve", "mms"])
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


def tops(answers: list[Answer]) -> list[str]:
    assert {answer.status for answer in answers} == {200}
    return [str(next(iter(answer.json()))) for answer in answers]


def worker(running: Running) -> psutil.Process:
    assert running.state.java is not None
    children = psutil.Process(running.state.java).children(recursive=True)
    workers = [child for child in children if "model_service_worker" in " ".join(child.cmdline())]
    # Multi Model Server's worker forks the one that answers.
    (found,) = [one for one in workers if not any(other.ppid() == one.pid for other in workers)]
    return found


def memory(process: psutil.Process, key: str) -> float:
    line = next(line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


@pytest.fixture(scope="module")
def of_the_run(trained: Path, photographs: list[bytes]) -> list[str]:
    run = open_run(trained)
    model, trained_network, found = run.config().model, network(run), []
    with torch.inference_mode():
        for data in photographs:
            crop = torch.from_numpy(np.array(pixels.decode(data, model.geometry))).permute(2, 0, 1)
            found.append(run.labels[int(trained_network(normalised(crop[None], model.mean, model.std)).argmax())])
    return found


def test_run_and_archive_agree_on_all_153_pictures(mar: Path, photographs: list[bytes], of_the_run: list[str]) -> None:
    with Sandbox(mar) as sandbox:
        assert tops(sandbox.predict(photographs)) == of_the_run


def test_the_server_agrees_with_the_run(running: Running, photographs: list[bytes], of_the_run: list[str]) -> None:
    with open_source(running.state.inference, "resnet18") as predict:
        assert tops(predict(photographs)) == of_the_run


def test_broken_pictures_among_photographs_harm_nobody(
    running: Running, photographs: list[bytes], of_the_run: list[str], shared_data: Path
) -> None:
    broken = {
        "synthetic/bee_cut_50pct.jpg": 422,
        "synthetic/not_an_image.jpg": 415,
        "synthetic/empty.jpg": 400,
        "synthetic/bomb_20000x20000_rgb.png": 413,
        "pillow/broken_data_stream.png": 422,
        "pillow/decompression_bomb.gif": 413,
    }
    bad = [((shared_data / "awkward" / name).read_bytes(), status) for name, status in broken.items()]
    good = list(zip(photographs, of_the_run, strict=True))
    choose, before = random.Random(7), worker(running)
    url = f"{running.state.inference}/predictions/resnet18"
    for _ in range(BATCHES):
        sent = [choose.choice(bad) if choose.random() < 0.5 else choose.choice(good) for _ in range(8)]
        post_as_one_batch(url, [data for data, _ in sent], [wanted for _, wanted in sent])
    assert worker(running).pid == before.pid


def test_the_workers_memory_comes_back(running: Running, shared_data: Path) -> None:
    awkward = [path.read_bytes() for path in sorted((shared_data / "awkward").rglob("*.*"))]
    url, process = f"{running.state.inference}/predictions/resnet18", worker(running)

    def send(pictures: list[bytes]) -> None:
        with ThreadPoolExecutor(8) as pool:
            for response in pool.map(lambda data: requests.post(url, data=data, timeout=60), pictures):
                assert response.status_code in (200, 400, 413, 415, 422), response.text

    send(awkward[:8])
    before = memory(process, "VmRSS")
    for _ in range(3):
        send(awkward)
    # The same last batch as before, because the memory of its forward pass is kept for the next one.
    send(awkward[:8])
    after, peak = memory(process, "VmRSS"), memory(process, "VmHWM")
    print(f"{running.state.server}: {before:.0f} MB before, {after:.0f} after, peak {peak:.0f}")  # noqa: T201
    assert abs(after - before) < 64
    assert peak - before < 50 * 16 + 64
