"""One gateway in front of two real servers, one of which dies under load."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from beeline.metrics import FOLDER
from serve.addresses import Ports
from serve.config import Overrides
from serve.counts import answers
from serve.instance.child import Running
from serve.up import Request, up
from tests.conftest import RED
from tests.serve.gateway.conftest import ROOT, wait_for

pytestmark = pytest.mark.server


@pytest.fixture
def servers(colour_archive: Path, environ: dict[str, str]) -> Iterator[list[Running]]:
    # Every request waits in its server for others, so there are some whenever one dies.
    overrides = Overrides(workers=1, batch_size=64, max_batch_delay=200)
    options: dict[str, Any] = {
        "store": colour_archive.parent,
        "overrides": overrides,
        "ports": Ports(0),
        "gateway": "none",
    }
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        requested = [Request(wanted=(str(colour_archive),), name=name, **options) for name in ("one", "two")]
        found = list(pool.map(lambda request: up(request, print, environ), requested))
    yield found
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
        found = re.search(r"^in front of one .*: (http://127\S+)\nmetrics, .*: (http://127\S+)$", said, re.MULTILINE)
        assert found is not None, said
        url, metrics = found.groups()

        def ask(_: int) -> tuple[int, str]:
            try:
                answer = requests.post(f"{url}/predictions/colours", data=RED, timeout=60)
                return answer.status_code, "" if answer.ok else answer.text
            except requests.ConnectionError as error:
                return 0, str(error)

        # The command says where it will listen a moment before it does.
        wait_for(lambda: ask(0)[0] == 200 and all(answered(each) >= 5 for each in servers))
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            under_way = [pool.submit(ask, number) for number in range(200)]
            wait_for(lambda: sum(each.done() for each in under_way), lambda count: count >= 50)
            java = servers[0].state.server_process
            assert java is not None
            psutil.Process(java).kill()
            assert sum(each.running() for each in under_way) == 8
            assert {each.result() for each in under_way} == {(200, "")}
        # The gateway keeps its own copy of the archives: that server and its folder may go.
        folder = folder_of_gateway(process.pid)
        assert folder / "store" != servers[0].state.store
        assert (folder / "store" / "colours.mar").is_file()
        # The prober sees from the workers' counts that a server is stuck.
        known = json.loads((folder / "gateway" / "settings.json").read_text())["backends"]
        assert [each["counts"] for each in known] == [each.state.environment[FOLDER] for each in servers]
        assert requests.get(f"{url}/nothing", timeout=30).status_code == 404
        own = 'beeline_gateway_answers_total{status="404"} 1.0'
        text = wait_for(lambda: requests.get(metrics, timeout=30).text, lambda text: own in text)
        assert "beeline_answers_total" not in text
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 0
    assert requests.post(f"{servers[1].state.backend}/predictions/colours", data=RED, timeout=30).status_code == 200


def folder_of_gateway(pid: int) -> Path:
    """Return the temporary folder of a gateway, which its nginx was started in."""
    commands = [" ".join(child.cmdline()) for child in psutil.Process(pid).children(recursive=True)]
    (folder,) = {found[1] for each in commands if (found := re.search(r"(/\S+)/gateway/", each))}
    return Path(folder)


def answered(server: Running) -> int:
    counts = answers(Path(server.state.environment[FOLDER])) or {}
    return counts.get("colours", {}).get("200", 0)
