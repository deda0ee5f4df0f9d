"""A real Prometheus reads a real exporter with this configuration, and answers the whole dashboard."""

from __future__ import annotations

import math
import os
import random
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from beeline.answer import Answer
from beeline.metrics import Metrics
from serve.metrics import Collector, serve_metrics
from serve.ports import Address, settle
from tests.config.conftest import PROMETHEUS, Query, draw, program, queries, variables
from tests.conftest import worker
from tests.serve.conftest import wait_for

pytestmark = pytest.mark.server

KEY = ("colours", "1.0")
# Thirty scrapes, so that late ones leave enough for a rate; and a short look back.
FILLED = {"__rate_interval": "30s", "__range": "60s"}
# While nothing is wrong nothing fires.
EMPTY_IS_FINE = {"Alerts A"}


@dataclass
class Served:
    """A Prometheus that listens."""

    address: str
    target: str

    def ask(self, path: str, **parameters: str | float) -> Any:
        """Return its answer, which is no error."""
        answer = requests.get(f"{self.address}/api/v1/{path}", params=parameters, timeout=10)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def values(self, query: Query) -> list[float]:
        """Return every number of a query of the dashboard, as its panel gets them."""
        if query.instant:
            found = self.ask("query", query=query.expr)["result"]
            return [float(one["value"][1]) for one in found]
        now = time.time()
        found = self.ask("query_range", query=query.expr, start=now - 60, end=now, step=1)["result"]
        return [float(value) for one in found for _, value in one["values"]]


def variant(folder: Path, target: str) -> Path:
    """Write our configuration with another target and a shorter interval."""
    shutil.copytree(PROMETHEUS, folder)
    path = folder / "prometheus.yml"
    values = yaml.safe_load(path.read_text())
    job = values["scrape_configs"][0]
    del job["dns_sd_configs"]
    # The look-up by name sets this label, and our relabelling reads it.
    job["static_configs"] = [{"targets": [target], "labels": {"__meta_dns_name": "backend"}}]
    values["global"] |= {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    path.write_text(yaml.safe_dump(values))
    return path


def traffic(drawn: Metrics, even: Metrics, stop: threading.Event) -> None:
    """Count as two workers do: one draws, the other has nothing but batches of four."""
    choose = random.Random(11)
    while not stop.wait(0.2):
        draw(drawn, choose, 6)
        even.count([Answer(200, "OK", "{}")] * 4, [30.0] * 4, {"decode": 3.0, "forward": 20.0, "encode": 0.5})


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Prometheus, once it has read the exporter often enough that the slowest of our rules has a value."""
    folder = tmp_path_factory.mktemp("scrape")
    counts, log = folder / "counts", folder / "prometheus.log"
    counts.mkdir()
    collector = Collector(counts)
    collector.expect({KEY: 1, ("even", "2.0"): 1})
    stop = threading.Event()
    # A worker that has died.
    worker(counts, *KEY)
    living = worker(counts, *KEY, pid=os.getpid()), worker(counts, "even", "2.0", pid=os.getppid())
    thread = threading.Thread(target=traffic, args=(*living, stop))
    thread.start()
    (listen,) = settle([(Address("127.0.0.1", 0), "")])
    with serve_metrics(("127.0.0.1", 0), collector) as port, log.open("wb") as file:
        running = Served(str(listen), f"127.0.0.1:{port}")
        command = [program("prometheus"), f"--config.file={variant(folder / 'prometheus', running.target)}"]
        command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{listen.port}"]
        with subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process:

            def has_values() -> bool:
                assert process.poll() is None, log.read_text()[-3000:]
                try:
                    # It listens before it has read its storage, and answers 503 until then.
                    is_ready = requests.get(f"{running.address}/-/ready", timeout=10).status_code == 200
                    rule = "count_over_time(beeline:answers:5xx_ratio_5m[1m]) > 2"
                    return is_ready and bool(running.ask("query", query=rule)["result"])
                except requests.ConnectionError:
                    return False

            try:
                wait_for(has_values)
                yield running
            finally:
                process.terminate()
                process.wait(30)
                stop.set()
                thread.join()
    assert process.returncode == 0, log.read_text()[-3000:]


def filled(**chosen: str) -> list[Query]:
    return queries({**FILLED, **dict.fromkeys(variables(), ".*"), **chosen})


def test_the_exporter_is_read_and_every_rule_evaluated_without_an_error(served: Served) -> None:
    (target,) = served.ask("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
    assert target["labels"] == {"job": "beeline", "instance": served.target, "service": "backend"}
    found = [rule for group in served.ask("rules")["groups"] for rule in group["rules"]]
    assert len(found) == 12
    assert [(rule["name"], rule.get("lastError")) for rule in found if rule["health"] != "ok"] == []


def test_every_query_is_answered_with_data(served: Served) -> None:
    def without_data() -> list[str]:
        asked = [query for query in filled() if query.where not in EMPTY_IS_FINE]
        return [query.expr for query in asked if not any(map(math.isfinite, served.values(query)))]

    assert {query.where for query in filled()} >= EMPTY_IS_FINE
    # A scrape may come late, and then the last minute has nothing.
    wait_for(without_data, lambda queries: not queries)


def test_one_instance_and_one_model_can_be_chosen(served: Served) -> None:
    """Grafana escapes the values in an expression: `127.0.0.1` is no pattern."""
    chosen = {"instance": re.escape(served.target).replace("\\", "\\\\"), "model": "even", "version": "2\\\\.0"}
    asked = (
        "Requests per second A",
        "Mean batch size A",
        "Queue B",
        "Forward A",
        *(f"Instances {one}" for one in "ACD"),
    )
    wait_for(lambda: all(served.values(query) for query in filled(**chosen) if query.where in asked))
    found = {query.where: served.values(query) for query in filled(**chosen)}
    assert found["Requests per second A"][-1] > 0
    # All of its batches have four requests, waited 30 ms and took 20 ms.
    assert set(found["Instances C"]) == {4.0}
    assert found["Mean batch size A"][-1] == pytest.approx(4)
    assert found["Instances D"] == [pytest.approx(0.03, abs=1e-6)]
    assert 0.025 < found["Queue B"][-1] <= 0.05
    assert 0.01 < found["Forward A"][-1] <= 0.025
    assert found["Instances A"] == [1.0]
    assert found["Server errors A"] == [0.0]
    nobody = {query.where: served.values(query) for query in filled(model="nobody")}
    assert nobody["Requests per second A"] == nobody["Instances A"] == []


def test_the_histogram_of_batch_sizes_is_true(served: Served) -> None:
    (query,) = (query for query in filled(model="even") if query.where == "Batches by size A")
    found = wait_for(lambda: served.ask("query", query=query.expr)["result"])
    rows = {one["metric"]["le"]: float(one["value"][1]) for one in found}
    assert rows.keys() >= {"1.0", "2.0", "4.0", "8.0", "128.0", "+Inf"}
    assert rows["2.0"] == 0 < rows["4.0"] == rows["+Inf"]
