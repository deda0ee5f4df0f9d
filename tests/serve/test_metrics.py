"""What `/metrics` says, over HTTP, of what real workers counted."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from beeline.answer import Answer
from beeline.errors import BeelineError
from beeline.metrics import FOLDER
from serve import counts
from serve.metrics import GRACE, Collector, serve_metrics
from tests.conftest import worker

GOOD, BAD = Answer(200, "OK", "{}"), Answer(415, "Unsupported Media Type", "{}", reason="not_an_image")
COLOURS = {"model": "colours", "version": "1.0"}
KEY = ("colours", "1.0")
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]

# Real worker processes, one after the other: each counts one batch, says its id and waits to be killed.
WORKERS = """
import os, signal, sys
import prometheus_client
from beeline.answer import Answer
from beeline.metrics import Metrics
for _ in sys.stdin:
    if os.fork() == 0:
        metrics = Metrics("colours", "1.0", {"device": {"value": "cpu", "reason": "asked for"}})
        metrics.count([Answer(200, "OK", "{}")] * 3, [1.0] * 3, {"decode": 1.0, "forward": 20.0, "encode": 0.1})
        print(os.getpid(), flush=True)
        signal.pause()
    os.wait()
    print("ended", flush=True)
"""


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Workers:
    """Starts worker processes and kills them, one at a time."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, FOLDER: str(folder)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKERS], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self) -> None:
        """Return when one more has counted its batch."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.pid = int(self._said())

    def kill(self) -> None:
        """Return when the one is gone."""
        os.kill(self.pid, 9)
        assert self._said() == "ended"

    def stop(self) -> None:
        self._process.communicate(timeout=30)

    def _said(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def parse(text: str) -> Samples:
    """Return every sample by name and labels, each of them once."""
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in samples
            samples[key] = sample.value
    return samples


def scrape(collector: Collector) -> Samples:
    registry = CollectorRegistry()
    registry.register(collector)
    return parse(generate_latest(registry).decode())


def value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((name, frozenset(labels.items())))


def counters(samples: Samples) -> Samples:
    ends = ("_total", "_bucket", "_count", "_sum")
    return {key: number for key, number in samples.items() if key[0].endswith(ends)}


def fallen(before: Samples, after: Samples) -> Samples:
    return {key: after[key] for key, number in counters(before).items() if after.get(key, -1) < number}


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    running = Workers(tmp_path)
    yield running
    running.stop()


@pytest.fixture
def exporter(tmp_path: Path) -> Iterator[str]:
    """Serve the metrics of a folder and return their address."""
    with serve_metrics(("127.0.0.1", 0), Collector(tmp_path)) as port:
        yield f"http://127.0.0.1:{port}/metrics"


def test_answers_and_errors_of_all_workers_are_added_up(tmp_path: Path, exporter: str) -> None:
    for version, batches in (("1.0", 2), ("1.0", 3), ("2.0", 1)):
        metrics = worker(tmp_path, version=version)
        for _ in range(batches):
            metrics.count([GOOD, GOOD, BAD], [None] * 3, {})
    answer = requests.get(exporter, timeout=10)
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    samples = parse(answer.text)
    assert value(samples, "beeline_answers_total", **COLOURS, status="200") == 10
    assert value(samples, "beeline_answers_total", **COLOURS, status="415") == 5
    assert value(samples, "beeline_answers_total", model="colours", version="2.0", status="200") == 2
    assert value(samples, "beeline_errors_total", **COLOURS, reason="not_an_image") == 5
    assert value(samples, "beeline_worker_starts_total", **COLOURS) == 2
    assert value(samples, "beeline_metrics_files_unreadable") == 0
    # This project's own, and none of this process or of Python.
    assert all(name.startswith("beeline_") for name, _ in samples)


def test_histograms_are_cumulative_and_in_seconds(tmp_path: Path) -> None:
    for queue in (2.5, 700.0, 90_000.0, 500_000.0):
        worker(tmp_path).count([GOOD] * 3, [queue, None, None], {"decode": 2.0, "forward": 30.0, "encode": 0.2})
    samples = scrape(Collector(tmp_path))
    for name in ("batch_size", "queue_seconds", "decode_seconds", "forward_seconds", "encode_seconds"):
        rows = [
            (float(dict(labels)["le"]), number)
            for (found, labels), number in samples.items()
            if found == f"beeline_{name}_bucket"
        ]
        assert [number for _, number in sorted(rows)] == sorted(number for _, number in rows)
        assert max(rows) == (float("inf"), value(samples, f"beeline_{name}_count", **COLOURS)) == (float("inf"), 4)
    assert value(samples, "beeline_queue_seconds_bucket", **COLOURS, le="0.0025") == 1
    assert value(samples, "beeline_queue_seconds_bucket", **COLOURS, le="1.0") == 2
    assert value(samples, "beeline_queue_seconds_bucket", **COLOURS, le="120.0") == 3
    assert value(samples, "beeline_queue_seconds_sum", **COLOURS) == pytest.approx(590.7025, abs=1e-5)
    assert value(samples, "beeline_forward_seconds_sum", **COLOURS) == pytest.approx(0.12, abs=1e-5)
    assert value(samples, "beeline_batch_size_bucket", **COLOURS, le="2.0") == 0
    assert value(samples, "beeline_batch_size_bucket", **COLOURS, le="4.0") == 4
    assert value(samples, "beeline_batch_size_sum", **COLOURS) == 12


def test_a_dead_workers_counts_stay_and_its_death_is_a_restart(tmp_path: Path, workers: Workers) -> None:
    clock = Clock()
    collector = Collector(tmp_path, clock)
    collector.expect({KEY: 1})
    assert value(scrape(collector), "beeline_workers", **COLOURS) == 0
    workers.start()
    assert counts.read(tmp_path).choices() == {KEY: {"device": {"value": "cpu", "reason": "asked for"}}}
    before = scrape(collector)
    workers.kill()
    assert value(before, "beeline_workers", **COLOURS) == 1
    assert value(before, "beeline_answers_total", **COLOURS, status="200") == 3
    clock.now += 1
    after = scrape(collector)
    assert value(after, "beeline_workers", **COLOURS) == 0
    assert counters(after) == counters(before)
    collector.keep()
    clock.now += GRACE
    later = scrape(collector)
    assert value(later, "beeline_worker_restarts_total", **COLOURS) == 1
    assert value(later, "beeline_worker_starts_total", **COLOURS) == 1
    assert counts.read(tmp_path).choices() == {}


def test_a_hundred_workers_that_are_killed_leave_their_sums_and_few_files(tmp_path: Path, workers: Workers) -> None:
    collector = Collector(tmp_path)
    before: Samples = {}
    for number in range(1, 101):
        workers.start()
        samples = scrape(collector)
        assert value(samples, "beeline_workers", **COLOURS) == 1
        assert value(samples, "beeline_answers_total", **COLOURS, status="200") == 3 * number
        assert fallen(before, samples) == {}
        workers.kill()
        if number % 3 == 0:
            collector.keep()
        before = samples
    collector.keep()
    start = time.process_time()
    samples = scrape(collector)
    # A hundred processes' own files take over a second.
    assert time.process_time() - start < 0.3
    assert counters(samples).items() >= counters(before).items() - {
        item for item in counters(before).items() if item[0][0] == "beeline_worker_restarts_total"
    }
    assert value(samples, "beeline_worker_starts_total", **COLOURS) == 100
    assert value(samples, "beeline_batch_size_sum", **COLOURS) == 300
    assert value(samples, "beeline_forward_seconds_sum", **COLOURS) == pytest.approx(2, abs=1e-3)
    assert value(samples, "beeline_metrics_files_unreadable") == 0
    names = sorted(path.name.rpartition("-")[0] or path.name for path in tmp_path.iterdir())
    assert names == ["counter_folded", "folded.json", "histogram_folded", "lock"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 100_000


def test_scaling_down_is_no_restart(tmp_path: Path) -> None:
    clock = Clock()
    collector = Collector(tmp_path, clock)
    collector.expect({KEY: 2})
    worker(tmp_path, pid=os.getpid())
    scrape(collector)
    worker(tmp_path)
    scrape(collector)
    collector.expect({KEY: 1})
    clock.now += 2 * GRACE
    assert value(scrape(collector), "beeline_worker_restarts_total", **COLOURS) == 0


def test_those_lost_before_the_exporter_started_are_no_restarts(tmp_path: Path) -> None:
    worker(tmp_path)
    clock = Clock()
    collector = Collector(tmp_path, clock)
    clock.now += 2 * GRACE
    assert value(scrape(collector), "beeline_worker_restarts_total", **COLOURS) == 0


def test_no_counter_ever_goes_down(tmp_path: Path) -> None:
    """Workers start, count, and die without a word, and their files are folded at any time."""
    choose = random.Random(7)
    collector = Collector(tmp_path)
    living = worker(tmp_path, pid=os.getpid())
    living.count([GOOD, BAD], [1.0], {})
    before = scrape(collector)
    for _ in range(100):
        what = choose.random()
        if what < 0.2:
            worker(tmp_path, version=choose.choice(["1.0", "2.0"])).count([GOOD, BAD], [5.0, 9.0], {"encode": 0.2})
        elif what < 0.3:
            (tmp_path / f"{choose.random()}.json").write_text("half a fi")
        elif what < 0.5:
            collector.keep()
        else:
            queues = [choose.uniform(0, 10_000) for _ in range(choose.randint(1, 8))]
            living.count([choose.choice([GOOD, BAD]) for _ in queues], queues, {"forward": queues[0]})
        after = scrape(collector)
        assert fallen(before, after) == {}
        before = after
    assert (value(after, "beeline_worker_starts_total", **COLOURS) or 0) > 5


def test_any_text_as_a_label_is_one_line(tmp_path: Path) -> None:
    model = 'a"b\\c\nd é'
    worker(tmp_path, model).count([GOOD], [], {})
    assert value(scrape(Collector(tmp_path)), "beeline_answers_total", model=model, version="1.0", status="200") == 1


def test_foreign_files_are_counted_and_harm_nothing(tmp_path: Path, exporter: str) -> None:
    (tmp_path / "1-1.json").write_text("half a fi")
    (tmp_path / "counter_1-1.db").write_text("half a fi")
    worker(tmp_path, pid=os.getpid())
    samples = parse(requests.get(exporter, timeout=10).text)
    assert value(samples, "beeline_metrics_files_unreadable") == 2
    assert value(samples, "beeline_workers", **COLOURS) == 1


def test_one_metric_can_be_asked_for(tmp_path: Path, exporter: str) -> None:
    answer = requests.get(exporter, params={"name[]": "beeline_metrics_files_unreadable"}, timeout=10)
    assert {name for name, _ in parse(answer.text)} == {"beeline_metrics_files_unreadable"}


def test_a_connection_that_says_nothing_keeps_nobody_waiting_and_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.metrics._Handler.timeout", 0.5)
    with (
        serve_metrics(("127.0.0.1", 0), Collector(tmp_path)) as port,
        socket.create_connection(("127.0.0.1", port), timeout=10) as silent,
    ):
        assert requests.get(f"http://127.0.0.1:{port}/metrics", timeout=5).status_code == 200
        assert silent.recv(1) == b""


def test_a_stopped_exporter_gives_its_port_back(tmp_path: Path) -> None:
    collector = Collector(tmp_path)
    refused = r"cannot be served on http://127\.0\.0\.1:.* give another --metrics-port"
    with serve_metrics(("127.0.0.1", 0), collector) as port:
        again = serve_metrics(("127.0.0.1", port), collector)
        with pytest.raises(BeelineError, match=refused), again:
            raise AssertionError("two listen there")
    with serve_metrics(("127.0.0.1", port), collector):
        pass
