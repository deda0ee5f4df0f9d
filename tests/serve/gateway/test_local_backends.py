"""One gateway over two real servers, one of which dies under load."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

from beeline.metrics import FOLDER
from serve.addresses import Ports
from serve.config import Overrides
from serve.counts import answers
from serve.instance.child import Running
from serve.status import status
from serve.up import Request, up
from tests.conftest import RED
from tests.serve.gateway.conftest import wait_for

pytestmark = pytest.mark.server
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "BEELINE_STATE": str(tmp_path / "state")}


@pytest.fixture
def servers(colour_archive: Path, environ: dict[str, str]) -> Iterator[list[Running]]:
    found: list[Running] = []
    try:
        for name in ("one", "two"):
            asked = Request(
                wanted=(str(colour_archive),),
                store=colour_archive.parent,
                name=name,
                # Every request waits in its server for others, so some are there whenever one dies.
                overrides=Overrides(workers=1, batch_size=64, max_batch_delay=200),
                ports=Ports(0),
                gateway="none",
            )
            found.append(up(asked, print, environ))
        yield found
    finally:
        for each in found:
            each.stop()


def test_two_servers_share_the_load_and_one_may_die(servers: list[Running], environ: dict[str, str]) -> None:
    command = [sys.executable, "-m", "cli", "serve", "gateway", "one", "two", "--port", "0"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        said = "".join(itertools.takewhile(lambda line: not line.startswith("Ctrl-C"), process.stdout))
        found = re.search(r"^in front of one .*: (http://127\S+)$", said, re.MULTILINE)
        metrics = re.search(r"^metrics, .*: (http://127\S+)$", said, re.MULTILINE)
        assert found is not None, said
        assert metrics is not None, said
        url = f"{found[1]}/predictions/colours"

        def ask(_: int) -> tuple[int, str]:
            answer = requests.post(url, data=RED, timeout=60)
            return answer.status_code, "" if answer.ok else answer.text

        deadline = time.monotonic() + 60
        while not shared(servers, found[1]):
            assert time.monotonic() < deadline, "the two do not share the load"
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            under_way = [pool.submit(ask, number) for number in range(200)]
            wait_for(lambda: sum(each.done() for each in under_way), lambda count: count >= 50)
            java = servers[0].state.java
            assert java is not None
            psutil.Process(java).kill()
            assert sum(each.running() for each in under_way) == 8
            assert {each.result() for each in under_way} == {(200, "")}
        # What the prober knows the models from stays when that server and its folder are gone.
        served = store_of_gateway(process.pid)
        assert served != servers[0].state.store
        assert (served / "colours.mar").is_file()
        assert requests.get(f"{found[1]}/nothing", timeout=30).status_code == 404
        own = 'beeline_gateway_answers_total{status="404"} 1.0'
        wait_for(lambda: requests.get(metrics[1], timeout=30).text, lambda text: own in text)
        assert "beeline_answers_total" not in requests.get(metrics[1], timeout=30).text
        # The counts of its workers tell that the other one is stuck.
        with frozen(servers[1]):
            wait_for(
                lambda: requests.get(f"{found[1]}/ping", timeout=30).json().get("reason", ""),
                lambda reason: "nobody has got an answer" in reason,
            )
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 0
    assert requests.post(f"{servers[1].state.backend}/predictions/colours", data=RED, timeout=30).status_code == 200


def store_of_gateway(pid: int) -> Path:
    """Return the folder of archives beside the gateway's own configuration, which its nginx was started with."""
    commands = [" ".join(child.cmdline()) for child in psutil.Process(pid).children(recursive=True)]
    folders = {found[1] for each in commands if (found := re.search(r"(/\S+)/gateway/", each))}
    assert len(folders) == 1, commands
    return Path(folders.pop()) / "store"


@contextlib.contextmanager
def frozen(server: Running) -> Iterator[None]:
    """Stop its workers where they are."""
    seen = status(server.instance.folder.parent, server.instance.name)["servers"][0]
    workers = [psutil.Process(each["pid"]) for each in seen["processes"] if each["kind"] == "worker"]
    assert workers
    for worker in workers:
        worker.suspend()
    try:
        yield
    finally:
        for worker in workers:
            worker.resume()


def shared(servers: list[Running], url: str) -> bool:
    """Send 20 pictures and say whether both servers have answered some of them."""
    before = [answered(each) for each in servers]
    try:
        for _ in range(20):
            requests.post(f"{url}/predictions/colours", data=RED, timeout=60)
    except requests.ConnectionError:
        # It says where it will listen a moment before it does.
        time.sleep(0.1)
        return False
    return all(answered(each) - was >= 5 for each, was in zip(servers, before, strict=True))


def answered(server: Running) -> int:
    counted = answers(Path(server.state.environment[FOLDER])) or {}
    return counted.get("colours", {}).get("200", 0)
