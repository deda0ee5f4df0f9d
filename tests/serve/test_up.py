"""Several models and versions on one real server: each in its turn, and one that does not start harms no other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import requests

from host import machine
from serve.addresses import Ports
from serve.config import Overrides
from serve.instance import failures
from serve.instance.child import Running
from serve.scale import scale
from serve.status import lines, status
from serve.up import Request, up
from tests.serve.conftest import MakeArchive, wait_for

pytestmark = pytest.mark.server
# Each load writes when it begins and when it ends.
LOAD = """
import time
for word in "+-":
    with open({path!r}, "a") as file:
        file.write(word)
    time.sleep(0.5)
"""
GOOD = {("fake", "1.0"): "red", ("fake", "2.0"): "blue", ("m0", "1.0"): "red", ("m1", "1.0"): "red"}


@pytest.fixture(scope="module", params=["torchserve", "mms"])
def several(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_fake: MakeArchive, state_home: Path
) -> Iterator[tuple[Running, list[str], Path]]:
    """A server with two versions of a model, two other models, and one that does not start without its gate.

    It comes with the lines that `up` has said, and the folder of the store and the gate.
    """
    store, said = tmp_path_factory.mktemp(request.param), list[str]()
    load = LOAD.format(path=str(store / "loads"))
    for (model, version), label in GOOD.items():
        make_fake(store, model, label, expected=label, version=version, load=load)
    make_fake(store, "broken", expected="red", gate=store / "gate")
    numbers, environ = Overrides(workers=1), {**os.environ, "BEELINE_STATE": str(state_home)}
    asked = Request(request.param, store=store, name=f"several-{request.param}", overrides=numbers, ports=Ports(0))
    with up(asked, said.append, environ) as running:
        yield running, said, store


def predict(running: Running, path: str) -> requests.Response:
    return requests.post(f"{running.state.inference}/predictions/{path}", data=b"x", timeout=60)


def label(running: Running, path: str) -> str:
    return str(next(iter(predict(running, path).json())))


def ping(running: Running) -> tuple[int, dict[str, Any]]:
    answer = requests.get(f"{running.state.inference}/ping", timeout=10)
    return answer.status_code, answer.json()


def seen(running: Running) -> dict[str, Any]:
    return dict(status(running.instance.folder.parent, running.instance.name)["servers"][0])


def test_no_more_load_at_a_time_than_there_are_cores(several: tuple[Running, list[str], Path]) -> None:
    words = (several[2] / "loads").read_text()
    running = list(accumulate(1 if word == "+" else -1 for word in words))
    assert words.count("+") >= 3
    assert max(running) <= machine.cores()


def test_versions_are_served_side_by_side_or_the_default_alone(several: tuple[Running, list[str], Path]) -> None:
    running, said, _ = several
    assert [label(running, path) for path in ("fake", "fake/1.0", "m0", "m1/1.0")] == ["red"] * 4
    refused = [predict(running, "fake/3.0")]
    if running.state.server == "torchserve":
        assert label(running, "fake/2.0") == "blue"
        assert scale(running.instance, running.state, "fake/2.0", 2, 2, print).workers == 2
        workers = {(model["name"], model["version"]): model["ready"] for model in seen(running)["models"]}
        assert (workers["fake", "1.0"], workers["fake", "2.0"]) == (1, 2)
    else:
        assert "Multi Model Server serves one version of a model, its default; not served: fake 2.0" in said
        refused.append(predict(running, "fake/2.0"))
    for answer in refused:
        assert answer.status_code == 404
        assert answer.json()["message"]


def test_one_that_does_not_start_is_named_and_harms_no_other_until_it_is_scaled_up(
    several: tuple[Running, list[str], Path],
) -> None:
    running, said, store = several
    (warning,) = (line for line in said if line.startswith("warning: broken 1.0 is not served: "))
    assert "the gate is shut" in warning
    code, values = ping(running)
    assert (code, values["status"], values["closed"]) == (200, "Healthy", ["broken@", "broken@1.0"])
    assert "the gate is shut" in values["failed"]["broken/1.0"]
    assert "  broken/1.0 is not served: " in "\n".join(lines({"servers": [seen(running)], "ended": [], "swept": {}}))
    assert predict(running, "broken").status_code == 503
    assert label(running, "m1") == "red"
    (store / "gate").touch()
    scale(running.instance, running.state, "broken", 1, 1, print)
    wait_for(lambda: ping(running)[1], lambda values: "failed" not in values and "closed" not in values)
    assert label(running, "broken") == "red"
    assert seen(running)["failed"] == {}
    # When the server is started again, this model is too.
    assert failures(running.instance.failed) == {}
