"""Real LitServe behind the real gateway: the handler's answers, several archives and versions, a full queue, deaths."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from importlib import metadata
from pathlib import Path

import psutil
import pytest
import requests

from archive.sandbox import Sandbox
from beeline.errors import Undetermined
from host import processes
from serve.addresses import Ports
from serve.client import InferenceClient, ManagementClient
from serve.config import Overrides
from serve.gateway.settings import CLASSES
from serve.instance import MARK
from serve.instance.child import Running
from serve.servers.litserve import LitServe
from serve.status import status
from serve.up import Request, up
from tests.conftest import GREEN, RED, pack, post_together, until_one_batch, write_archive
from tests.serve.conftest import wait_for

pytestmark = pytest.mark.server

# It answers `wait` when its file is gone.
SLOW = """
import os, time

class Slow:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        while b"wait" in [bytes(row["body"]) for row in data] and os.path.exists({gate!r}):
            time.sleep(0.02)
        return ['{{"version": "{version}"}}'] * len(data)
"""
QUEUE = 3


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gate") / "gate"


@pytest.fixture(scope="module")
def running(openvino_model: Path, gate: Path, state_home: Path) -> Iterator[Running]:
    """One worker for each of three archives, two of which are versions of one model."""
    folder = gate.parent
    archives = [pack(openvino_model, folder / "colours.mar")]
    for version in ("1.0", "2.0"):
        code = SLOW.format(gate=str(gate), version=version)
        files = {"slow.py": code.encode(), "model.pt": b"no model"}
        archives.append(write_archive(folder / f"slow-{version}.mar", "slow", files, "slow.py", version=version))
    properties = folder / "config.properties"
    properties.write_text(f"job_queue_size={QUEUE}\n")
    overrides = Overrides(batch_size=8, workers=1, max_batch_delay=300)
    names, environ = tuple(map(str, archives)), {**os.environ, "BEELINE_STATE": str(state_home)}
    asked = Request("litserve", names, folder, properties, "litserve", overrides, Ports(0))
    with up(asked, print, environ) as server:
        yield server
    assert processes.marked(MARK, server.state.mark) == []


def worker(running: Running, model: str) -> psutil.Process:
    with ManagementClient(running.state.management) as management:
        described = wait_for(lambda: management.describe(model), lambda one: one is not None and one.ready == 1)
    assert described is not None
    return psutil.Process(described.workers[0].pid)


def test_batches_with_broken_pictures_get_the_handlers_own_answers(running: Running, shared_data: Path) -> None:
    """tests/cli/test_same_answers.py sends all of them, to every server."""
    real = sorted((shared_data / "hymenoptera_data" / "val").glob("*/*.jp*g"))[::20]
    paths = [*real, *sorted(path for path in (shared_data / "awkward").rglob("*.*") if path.stat().st_size < 10**6)]
    sent = [b"", b"no picture", *(path.read_bytes() for path in paths)]
    with Sandbox(running.state.store / "colours.mar") as sandbox:
        expected = [(one.status, one.json()) for one in sandbox.predict(sent)]
    assert {code for code, _ in expected} >= {200, 400, 415, 422}
    url = f"{running.state.backend}/predictions/colours"
    for one, wanted in list(zip(sent, expected, strict=True))[:: len(sent) // 8]:
        answer = requests.post(f"{running.state.inference}/predictions/colours", data=one, timeout=60)
        assert (answer.status_code, answer.json(), answer.headers["X-Batch-Size"]) == (*wanted, "1")
        assert answer.status_code != 200 or "forward;dur=" in answer.headers["Server-Timing"]
    for start in range(0, len(sent), 2 * QUEUE):
        part = slice(start, start + 2 * QUEUE)
        answers = until_one_batch(partial(post_together, url, sent[part]))
        assert [(one.status_code, one.json()) for one in answers] == expected[part]


def test_a_worker_imports_no_pytorch_and_counts_like_others(running: Running) -> None:
    maps = worker(running, "colours").memory_maps()
    assert not [one.path for one in maps if "torch" in Path(one.path).name]
    (server,) = status(running.instance.folder.parent, "litserve")["servers"]
    assert server["state"] == "ready"
    assert server["answers"]["colours"]["200"] > 0
    assert [one["kind"] for one in server["processes"]].count("worker") == 3


def test_each_version_has_its_address_and_any_other_is_not_found(running: Running) -> None:
    with InferenceClient(running.state.inference) as client:
        versions = [client.predict("slow", b"", version).json() for version in (None, "1.0", "2.0")]
        assert versions == [{"version": "1.0"}, {"version": "1.0"}, {"version": "2.0"}]
        assert (client.predict("slow", b"", "3.0").status, client.predict("fast", b"").status) == (404, 404)
    with ManagementClient(running.state.management) as management:
        assert management.describe("slow", "3.0") is None


def test_scaling_down_loses_no_request(running: Running) -> None:
    url = f"{running.state.backend}/predictions/colours"
    with ManagementClient(running.state.management) as management, ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            management.scale("colours", 3, 3)
            wait_for(lambda: management.describe("colours"), lambda one: one is not None and one.ready == 3)
            management.scale("colours", 1, 1)
            answers = list(pool.map(lambda picture: requests.post(url, data=picture, timeout=60), [RED, GREEN] * 6))
            assert {each.status_code for each in answers} == {200}
    assert worker(running, "colours").is_running()


def test_a_full_queue_refuses_and_a_killed_worker_costs_only_the_requests_that_it_had(
    running: Running, gate: Path
) -> None:
    gate.touch()
    before = worker(running, "slow")
    url = f"{running.state.backend}/predictions/slow"
    # The server itself holds more than the gateway lets in of each class of size.
    held = (len(CLASSES) + 1) * QUEUE
    with ThreadPoolExecutor(held + 1) as pool:
        sent = [pool.submit(requests.post, url, data=b"wait", timeout=60) for _ in range(held + 1)]
        refused = next(as_completed(sent)).result()
        assert (refused.status_code, refused.json()["type"]) == (503, "QueueFull")
        before.kill()
        gate.unlink()
        answers = [one.result() for one in sent]
    types = [answer.json()["type"] for answer in answers if answer.status_code != 200]
    assert set(types) == {"QueueFull", "WorkerDied"}
    assert types.count("QueueFull") == 1
    assert worker(running, "slow").pid != before.pid
    assert requests.post(url, data=RED, timeout=60).status_code == 200
    assert requests.post(f"{running.state.backend}/predictions/colours", data=GREEN, timeout=60).status_code == 200


def test_without_the_package_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(Undetermined, match="the package litserve is not installed here; run `make setup`"):
        LitServe().prepare(print, {})
