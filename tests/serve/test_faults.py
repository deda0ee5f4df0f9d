"""Faults made for real, on real servers behind nginx: what clients see, and that all is well again by itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import requests

from serve.addresses import Ports
from serve.client import InferenceClient
from serve.config import Overrides
from serve.instance.child import Running
from serve.up import Request, up
from tests.conftest import RED
from tests.serve.conftest import wait_for
from tests.serve.servers.test_servers import workers_of

pytestmark = pytest.mark.server


@pytest.fixture(scope="module", params=["torchserve", "mms", "litserve"])
def served(request: pytest.FixtureRequest, colour_archive: Path, state_home: Path) -> Iterator[Running]:
    asked = Request(
        server=request.param,
        wanted=(str(colour_archive),),
        store=colour_archive.parent,
        name=f"faults-{request.param}",
        overrides=Overrides(workers=2),
        ports=Ports(0),
    )
    # A worker may be silent for half of the deadline.
    environ = {**os.environ, "BEELINE_STATE": str(state_home), "BEELINE_DEADLINE_SECONDS": "8"}
    with up(asked, print, environ) as running:
        yield running


def predict(served: Running) -> requests.Response:
    return requests.post(f"{served.state.inference}/predictions/colours", data=RED, timeout=10)


def good(served: Running) -> bool:
    # A worker of LitServe that was killed in the moment it took a request leaves it without an answer.
    with suppress(requests.Timeout):
        return predict(served).status_code == 200
    return False


def test_a_picture_whose_turn_comes_after_its_own_deadline_is_answered_504(served: Running) -> None:
    url, headers = f"{served.state.inference}/predictions/colours", {"X-Deadline-Ms": "0"}
    answer = requests.post(url, data=RED, headers=headers, timeout=10)
    assert (answer.status_code, answer.json()["type"]) == (504, "DeadlineExceeded")
    assert good(served)


def test_java_that_is_killed_is_started_again_while_nginx_answers(served: Running) -> None:
    assert good(served)
    assert served.state.server_process is not None
    os.kill(served.state.server_process, signal.SIGKILL)
    refused = wait_for(lambda: predict(served), lambda answer: answer.status_code == 503)
    assert (refused.headers["Retry-After"], refused.json()["type"]) == ("2", "NotReady")
    wait_for(lambda: good(served))
    with InferenceClient(served.state.inference) as client:
        wait_for(client.unready, lambda reason: reason is None)
    assert len({one.pid for one in workers_of(served)}) >= 2


def test_all_workers_that_are_killed_at_once_come_back(served: Running) -> None:
    before = {each.pid for each in workers_of(served)}
    for worker in workers_of(served):
        worker.kill()
    wait_for(lambda: good(served))
    if served.state.server == "mms":
        # Its own pauses grow with each death, so the supervisor did not wait for it.
        assert "colours/1.0 has no living worker" in (served.instance.logs / "supervisor.log").read_text()
    assert not before & {each.pid for each in workers_of(served) if each.status() != psutil.STATUS_ZOMBIE}


def suspend_at_work(served: Running, worker: psutil.Process) -> None:
    """Suspend a worker of LitServe under load until it was at work: nobody misses one that waits in the queue."""
    for _ in range(5):
        with ThreadPoolExecutor(8) as pool:
            load = [pool.submit(good, served) for _ in range(100)]
            wait_for(load[10].done)
            worker.suspend()
        if not worker.is_running():
            return
        worker.resume()


def test_a_worker_that_hangs_is_replaced(served: Running) -> None:
    worker = workers_of(served)[-1]
    if served.state.server == "litserve":
        suspend_at_work(served, worker)
    else:
        worker.suspend()
    try:
        if served.state.server == "mms":
            # It only hangs up on the worker, which ends when it goes on.
            wait_for(lambda: [good(served) for _ in range(10)], all)
            assert len(workers_of(served)) >= 3
        else:
            wait_for(lambda: (good(served), worker.is_running()), lambda seen: not seen[1])
            wait_for(lambda: [good(served) for _ in range(10)], all)
    finally:
        with suppress(psutil.Error):
            worker.resume()
