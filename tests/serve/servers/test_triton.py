"""The real tritonserver: batches, instances, an error a picture, and what comes back after a kill."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests

from archive.sandbox import Sandbox
from beeline.errors import BeelineError
from host import processes
from serve.addresses import Ports
from serve.client import ManagementClient
from serve.config import Overrides
from serve.instance import MARK
from serve.instance.child import Running
from serve.scale import scale
from serve.servers.triton import VENV
from serve.status import status
from serve.up import Request, up
from tests.conftest import BLUE, GREEN, RED, ROOT, pack, post_together, write_archive
from tests.serve.conftest import wait_for

pytestmark = pytest.mark.server
BROKEN = [b"", b"no picture", RED[:40], b'{"data": "?"}']


@pytest.fixture(scope="module")
def mar(openvino_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(openvino_model, tmp_path_factory.mktemp("mar") / "colours.mar")


@pytest.fixture(scope="module")
def served(mar: Path, state_home: Path) -> Iterator[Running]:
    """Two instances of the project's handler, in batches of 4."""
    environ = {**os.environ, "BEELINE_STATE": str(state_home)}
    numbers = Overrides(workers=2, batch_size=4, max_batch_delay=50)
    asked = Request("triton", (str(mar),), name="triton", overrides=numbers, ports=Ports(0))
    with up(asked, print, environ) as running:
        yield running
    assert processes.marked(MARK, running.state.mark) == []
    assert not list(Path("/dev/shm").glob(f"{Path(running.state.temporary).name}*"))


def tritonserver(running: Running) -> psutil.Process:
    (child,) = psutil.Process(running.state.server_process).children()
    return child


def address(running: Running) -> str:
    (port,) = (word.partition("=")[2] for word in tritonserver(running).cmdline() if word.startswith("--http-port="))
    return f"http://127.0.0.1:{port}/v2"


def infer(running: Running, sent: list[bytes], name: str = "picture", **asked: Any) -> requests.Response:
    """Ask tritonserver itself, in its own protocol."""
    data = b"".join(len(each).to_bytes(4, "little") + each for each in sent) if name == "picture" else sent[0]
    shape, kind = ([len(sent), 1], "BYTES") if name == "picture" else ([1, len(data)], "UINT8")
    size = {"binary_data_size": len(data)}
    inputs = [{"name": name, "shape": shape, "datatype": kind, "parameters": size}]
    head = json.dumps({"inputs": inputs, **asked}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    url = f"{address(running)}/models/colours"
    if not sent:
        return requests.get(f"{url}/stats", timeout=60)
    return requests.post(f"{url}/infer", data=head + data, headers=headers, timeout=60)


def outputs(response: requests.Response) -> dict[str, list[Any]]:
    assert response.status_code == 200, response.text
    return {each["name"]: each["data"] for each in response.json()["outputs"]}


def same_as_alone(running: Running, mar: Path, sent: list[bytes]) -> set[int]:
    """Send every body at once, and compare the answers with the handler's in a clean process; return the statuses."""
    with Sandbox(mar, batch_size=len(sent)) as sandbox:
        expected = [(each.status, each.body) for each in sandbox.predict(sent)]
    answers = post_together(f"{running.state.inference}/predictions/colours", sent)
    assert [(each.status_code, each.text) for each in answers] == expected
    assert all(re.search(r"queue;dur=\d", each.headers["Server-Timing"]) for each in answers)
    return {status for status, _ in expected}


def test_the_clients_headers_reach_the_handler(served: Running) -> None:
    url, kind = f"{served.state.inference}/predictions/colours", "application/vnd.beeline+json"
    detailed = requests.post(url, data=RED, headers={"Accept": kind}, timeout=60)
    assert detailed.headers["Content-Type"] == kind
    assert detailed.json()["model"]["name"] == "colours"


def test_its_answers_are_those_of_the_handler_alone(served: Running, mar: Path) -> None:
    pictures = [path.read_bytes() for path in sorted((ROOT / "tests" / "pictures").glob("*.jpg"))]
    assert same_as_alone(served, mar, [*pictures, RED, GREEN, BLUE, *BROKEN]) == {200, 400, 415, 422}


@pytest.mark.shared
def test_real_pictures_and_broken_ones_are_answered_as_by_the_handler_alone(
    served: Running, mar: Path, shared_data: Path
) -> None:
    pictures = sorted((shared_data / "hymenoptera_data" / "val").rglob("*.jpg"))[::20][:8]
    sent = [path.read_bytes() for path in pictures]
    assert same_as_alone(served, mar, [*sent, sent[0][:5000], *BROKEN]) == {200, 400, 415, 422}


def test_two_instances_take_batches_up_to_the_largest(served: Running) -> None:
    with ManagementClient(served.state.management) as management:
        model = management.describe("colours")
    assert model is not None
    assert (model.ready, model.batch_size, model.max_batch_delay) == (2, 4, 50)
    for _ in range(3):
        post_together(f"{served.state.inference}/predictions/colours", [RED, b"no picture"] * 12)
    (stats,) = infer(served, []).json()["model_stats"]
    assert max(each["batch_size"] for each in stats["batch_stats"]) == 4


def test_its_own_clients_get_scores_and_an_error_a_picture(served: Running) -> None:
    alone = infer(served, [b"no picture"])
    assert alone.status_code == 400
    assert json.loads(alone.json()["error"])["type"] == "NotAnImage"
    # Of several pictures in one request the good ones are answered.
    both = outputs(infer(served, [b"no picture", GREEN]))
    assert [json.loads(each).get("code") for each in both["answer"]] == [415, None]
    assert np.isnan(both["scores"][:3]).all()
    assert np.argmax(both["scores"][3:]) == 1
    named = infer(served, [BLUE], outputs=[{"name": "scores", "parameters": {"classification": 1}}])
    assert outputs(named)["scores"][0].endswith(":2:blue")


@pytest.mark.parametrize("http", [5, "5", "x", "[]", '{"accept": 5}'])
def test_what_a_client_sends_as_headers_fails_no_other(served: Running, http: object) -> None:
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(infer, served, [RED]) for _ in range(3)]
        assert outputs(infer(served, [GREEN], parameters={"http": http}))["answer"]
    assert all(outputs(each.result())["answer"] for each in others)


def test_only_the_translator_loads_models(served: Running) -> None:
    """A model is code, and a page in a browser of this machine reaches the port."""
    for verb in ("load", "unload"):
        refused = requests.post(f"{address(served)}/repository/models/colours/{verb}", data="{}", timeout=60)
        assert refused.status_code == 403
    assert outputs(infer(served, [RED]))["answer"]


def test_pictures_as_ragged_uint8_share_batches(served: Running) -> None:
    http = {"parameters": {"http": "{}"}, "outputs": [{"name": "answer"}, {"name": "http"}]}
    bodies = [RED, GREEN + bytes(100), b"no picture", BLUE] * 4
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = [outputs(each) for each in pool.map(lambda one: infer(served, [one], "bytes", **http), bodies)]
    first = [next(iter(json.loads(each["answer"][0]))) for each in answers]
    assert first == ["red", "green", "code", "blue"] * 4
    sizes = {int(json.loads(each["http"][0])["headers"]["X-Batch-Size"]) for each in answers}
    assert max(sizes) > 1


def test_the_goldens_hold_under_both_numpys(served: Running) -> None:
    """The workers replayed them at load; the sandbox of `archive verify` has the main environment's."""
    assert np.__version__.startswith("2.")
    (folder,) = VENV.glob("lib/python3*/site-packages/numpy-*.dist-info")
    assert folder.name.startswith("numpy-1.26")


def ready(running: Running, number: int) -> bool:
    with ManagementClient(running.state.management) as management:
        model = management.describe("colours")
    return model is not None and model.ready == len(model.workers) == number


def test_it_is_scaled_and_counted_like_other_servers(served: Running) -> None:
    for workers in (3, 0, 2):
        assert scale(served.instance, served.state, "colours", workers, workers, print).workers == workers
        wait_for(lambda: len(tritonserver(served).children()), partial(int.__eq__, workers))
    look = partial(status, served.instance.folder.parent, "triton")
    (server,) = wait_for(look, lambda seen: seen["servers"][0]["state"] == "ready")["servers"]
    assert server["answers"]["colours"]["200"] > 0
    assert server["models"][0]["ready"] == 2


@pytest.mark.parametrize("victim", ["worker", "tritonserver"])
def test_what_was_killed_comes_back_and_clients_get_json_meanwhile(served: Running, victim: str) -> None:
    url = f"{served.state.inference}/predictions/colours"
    server = tritonserver(served)
    (server if victim == "tritonserver" else server.children()[0]).kill()
    statuses = set()
    for _ in range(10):
        answer = requests.post(url, data=RED, timeout=60)
        statuses.add(answer.status_code)
        assert answer.status_code == 200 or answer.json()["message"]
    # Of a dead worker Triton's own words, while the other one serves.
    assert statuses <= ({200, 503} if victim == "tritonserver" else {200, 500})
    wait_for(partial(ready, served, 2))
    wait_for(lambda: requests.post(url, data=RED, timeout=60).status_code == 200)
    assert requests.post(url, data=BLUE, timeout=60).json()["blue"] > 0.9


def test_an_archive_that_is_not_of_beeline_is_refused_in_one_sentence(tmp_path: Path, state_home: Path) -> None:
    archive = write_archive(tmp_path / "old.mar", "old", {"model.pt": b"no model"}, "image_classifier")
    environ = {**os.environ, "BEELINE_STATE": str(state_home)}
    with pytest.raises(BeelineError, match=r"old.mar holds no checksums.json; build it with `beeline archive build`"):
        up(Request("triton", (str(archive),), name="old", ports=Ports(0), gateway="none"), print, environ)


def test_a_worker_that_refuses_its_archive_is_reported_with_its_reason(
    openvino_model: Path, tmp_path: Path, state_home: Path
) -> None:
    folder = shutil.copytree(openvino_model, tmp_path / "model")
    expected = folder / "golden" / "expected.json"
    expected.write_text(expected.read_text().replace("0.9", "0.5"))
    asked = Request(
        "triton", (str(pack(folder, tmp_path / "wrong.mar")),), name="refused", ports=Ports(0), gateway="none"
    )
    with pytest.raises(BeelineError, match=r"colours does not start: golden/0.png gives 'red' .*, expected 0\."):
        up(asked, print, {**os.environ, "BEELINE_STATE": str(state_home)})
    assert processes.marked(MARK, f"{state_home}/refused:") == []
