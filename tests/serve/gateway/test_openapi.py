"""A real TorchServe with everything on: the description of the API is true, and KServe's own client works."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from serve.addresses import Ports
from serve.config import Overrides
from serve.instance.child import Running
from serve.status import status
from serve.up import Request, up
from tests.conftest import BLUE, RED
from tests.serve.gateway.conftest import ROOT, WHOSE, environment
from tests.serve.gateway.fake_web import Web

pytestmark = pytest.mark.server
ROUTES = ROOT / "frontend" / "nginx" / "ROUTES.md"
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")
# A picture's bytes, or base64 as a client of KServe sends it.
B64 = base64.b64encode(RED).decode()
BODIES = {":predict": {"instances": [{"b64": B64}]}, "/infer": {"inputs": [{"datatype": "BYTES", "data": [B64]}]}}


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    started = Web()
    yield started
    started.stop()


@pytest.fixture(scope="module")
def running(colour_archive: Path, tmp_path_factory: pytest.TempPathFactory, web: Web) -> Iterator[Running]:
    """TorchServe behind the gateway; a fake web is the only thing that is not real."""
    folder = tmp_path_factory.mktemp("all")
    wrapper = folder / "python"
    gateway = f'[ "$2" = serve.gateway ] && shift 2 && exec {sys.executable} -m tests.serve.gateway.fake_web "$@"'
    wrapper.write_text(f'#!/bin/sh\n{gateway}\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    config = folder / "config.properties"
    config.write_text(
        f"beeline_url_hosts=pictures.test:{web.port}\nbeeline_url_http=true\nbeeline_kserve=true\n"
        f"beeline_server_routes=true\nbeeline_feedback={folder}/kept\n"
    )
    overrides = Overrides(workers=1, batch_size=4, max_batch_delay=20)
    asked = Request("torchserve", (str(colour_archive),), folder, config, overrides=overrides, ports=Ports(0))
    environ = {**environment(WHOSE[0]), "BEELINE_STATE": str(tmp_path_factory.mktemp("state"))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.executable", str(wrapper))
        server = up(asked, print, environ)
    with server:
        yield server


def send(running: Running, method: str, path: str) -> int:
    """Send a request with a fitting body; return the status."""
    body: Any = next((json.dumps(body) for end, body in BODIES.items() if path.endswith(end)), RED)
    url = f"{running.state.inference}{path}"
    return requests.request(method, url, data=body if method in ("POST", "PUT") else None, timeout=60).status_code


def filled(path: str) -> str:
    values = {"model": "colours", "version": "1.0", "file": "SAMPLE", "script": "page"}
    return re.sub(r"{(\w+)}", lambda match: values[match[1]], path)


def test_each_route_in_the_description_answers_and_each_route_that_answers_is_in_it(running: Running) -> None:
    url = running.state.inference
    described = requests.get(f"{url}/api-description", timeout=30).json()
    assert requests.options(f"{url}/", timeout=30).json() == described
    sample = requests.get(f"{url}/catalog.json", timeout=30).json()["models"][0]["samples"][0]["url"]
    paths = {
        filled(path).replace("SAMPLE", sample.rpartition("/")[2]): set(of) for path, of in described["paths"].items()
    }
    for path, methods in paths.items():
        answers = {method for method in METHODS if send(running, method, path) not in (404, 405)}
        assert answers == {method.upper() for method in methods - {"parameters"}}, path
    others = re.findall(r"\| \w+ \| `(\w+) (\S+)` \|", ROUTES.read_text(encoding="utf-8"))
    others += [("POST", path) for path in ("/v1/models/colours", "/v2/models/colours", "/v2/models/colours/explain")]
    for method, path in {(method, path.partition("?")[0]) for method, path in others}:
        if send(running, method, path) not in (404, 405):
            assert method.lower() in paths[path], (method, path)


def test_it_is_an_openapi_document_with_every_parameter_of_its_paths(running: Running) -> None:
    described = requests.get(f"{running.state.inference}/api-description", timeout=30).json()
    assert described["openapi"].startswith("3.")
    for path, operations in described["paths"].items():
        names = [each["$ref"].rpartition("/")[2] for each in operations.pop("parameters", [])]
        assert names == re.findall(r"{(\w+)}", path)
        assert names == [described["components"]["parameters"][name]["name"] for name in names]
        assert all({"summary", "responses"} <= operation.keys() for operation in operations.values())


def test_a_picture_gets_one_answer_by_every_way(running: Running, web: Web) -> None:
    url = running.state.inference
    plain = requests.post(f"{url}/predictions/colours", data=RED, timeout=60).json()
    by_url = requests.post(f"{url}/predictions/colours", json={"url": web.url("red.png")}, timeout=60)
    assert by_url.json() == plain
    old = requests.post(f"{url}/v1/models/colours:predict", json=BODIES[":predict"], timeout=60).json()
    new = requests.post(f"{url}/v2/models/colours/infer", json=BODIES["/infer"], timeout=60).json()
    assert old["predictions"] == [json.loads(new["outputs"][0]["data"][0])] == [plain]
    bad = {"instances": [{"b64": B64}, {"b64": "bm8="}, {"url": web.url("red.png")}, {"b64": "*"}]}
    judged = requests.post(f"{url}/v1/models/colours:predict", json=bad, timeout=60).json()["predictions"]
    assert [each.get("code", each) for each in judged] == [plain, 415, plain, 400]


def test_status_shows_the_adapter(running: Running) -> None:
    (server,) = status(running.instance.folder.parent, running.instance.name)["servers"]
    assert [each["kind"] for each in server["processes"]].count("adapter") == 1


def test_kserves_own_client_works_in_both_versions(running: Running, tmp_path: Path) -> None:
    (tmp_path / "blue.png").write_bytes(BLUE)
    command = [
        str(Path(sys.executable).with_name("uv")),
        "run",
        "--isolated",
        "--no-project",
        "--python",
        sys.executable,
    ]
    command += ["--with-requirements", str(ROOT / "requirements" / "kserve.txt"), "python"]
    command += [str(Path(__file__).with_name("kserve_client.py")), running.state.inference, str(tmp_path / "blue.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "NO_PROXY": "*"})
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["ready"] == seen["server"] == [True, True]
    assert seen["other"] is False
    fine, bad = seen["old"]["predictions"]
    assert (next(iter(fine)), bad["code"]) == ("blue", 415)
    answers, statuses = seen["new"]["outputs"]
    assert [json.loads(each).get("code") for each in answers["data"]] == [None, 415]
    assert (json.loads(answers["data"][0]), statuses["data"]) == (fine, [200, 415])
    assert seen["refused"] == 415
