"""`/metrics`: what it says of the counts of real workers, and which losses of workers are restarts."""

from __future__ import annotations

import os
import random
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from beeline.answer import Answer
from beeline.errors import BeelineError
from serve.metrics import GRACE, Collector, Restarts, serve_metrics
from tests.conftest import worker

GOOD, BAD = Answer(200, "OK", "{}"), Answer(415, "Unsupported Media Type", "{}", reason="not_an_image")
COLOURS = {"model": "colours", "version": "1.0"}
KEY = ("colours", "1.0")
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Exported:
    """The metrics of a folder, under a clock that the test moves."""

    def __init__(self, folder: Path) -> None:
        self.now = 0.0
        self.collector = Collector(folder, lambda: self.now)

    def scrape(self) -> Samples:
        registry = CollectorRegistry()
        registry.register(self.collector)
        return parse(generate_latest(registry).decode())

    def restarts(self) -> float | None:
        return value(self.scrape(), "beeline_worker_restarts_total", **COLOURS)


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


def value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((name, frozenset(labels.items())))


def counters(samples: Samples) -> Samples:
    ends = ("_total", "_bucket", "_count", "_sum")
    return {key: number for key, number in samples.items() if key[0].endswith(ends)}


def fallen(before: Samples, after: Samples) -> Samples:
    return {key: after[key] for key, number in counters(before).items() if after.get(key, -1) < number}


@pytest.fixture
def exporter(tmp_path: Path) -> Iterator[str]:
    """Serve the metrics of a folder and return their address."""
    with serve_metrics(("127.0.0.1", 0), Collector(tmp_path)) as port:
        yield f"http://127.0.0.1:{port}/metrics"


def test_answers_and_errors_of_all_workers_are_added_up_over_http(tmp_path: Path, exporter: str) -> None:
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
    # None of this process or of Python.
    assert all(name.startswith("beeline_") for name, _ in samples)


def test_a_dead_workers_counts_stay_and_its_death_is_a_restart(tmp_path: Path) -> None:
    exported = Exported(tmp_path)
    exported.collector.expect({KEY: 1})
    assert value(exported.scrape(), "beeline_workers", **COLOURS) == 0
    with subprocess.Popen(["sleep", "1000"]) as process:
        worker(tmp_path, pid=process.pid).count([GOOD] * 3, [1.0] * 3, {"forward": 20.0})
        before = exported.scrape()
        process.kill()
    assert value(before, "beeline_workers", **COLOURS) == 1
    assert value(before, "beeline_answers_total", **COLOURS, status="200") == 3
    exported.now += 1
    after = exported.scrape()
    assert value(after, "beeline_workers", **COLOURS) == 0
    assert counters(after) == counters(before)
    exported.collector.keep()
    exported.now += GRACE
    assert exported.restarts() == 1
    assert value(exported.scrape(), "beeline_worker_starts_total", **COLOURS) == 1


def test_neither_scaling_down_nor_a_loss_before_the_exporters_start_is_a_restart(tmp_path: Path) -> None:
    worker(tmp_path)
    exported = Exported(tmp_path)
    exported.collector.expect({KEY: 2})
    worker(tmp_path, pid=os.getpid())
    exported.scrape()
    worker(tmp_path)
    exported.scrape()
    exported.collector.expect({KEY: 1})
    exported.now += 2 * GRACE
    assert exported.restarts() == 0


def test_no_counter_ever_goes_down_and_few_files_remain(tmp_path: Path) -> None:
    """Workers start, count, and die without a word, and their files are folded at any time."""
    choose = random.Random(7)
    exported = Exported(tmp_path)
    living = worker(tmp_path, pid=os.getpid())
    living.count([GOOD, BAD], [1.0], {})
    before = exported.scrape()
    for _ in range(100):
        what = choose.random()
        if what < 0.2:
            worker(tmp_path, version=choose.choice(["1.0", "2.0"])).count([GOOD, BAD], [5.0, 9.0], {"encode": 0.2})
        elif what < 0.3:
            (tmp_path / f"{choose.random()}.json").write_text("half a fi")
        elif what < 0.5:
            exported.collector.keep()
        else:
            queues = [choose.uniform(0, 10_000) for _ in range(choose.randint(1, 8))]
            living.count([choose.choice([GOOD, BAD]) for _ in queues], queues, {"forward": queues[0]})
        after = exported.scrape()
        assert fallen(before, after) == {}
        before = after
    assert (value(after, "beeline_worker_starts_total", **COLOURS) or 0) > 5
    exported.collector.keep()
    names = [path.name for path in tmp_path.iterdir() if not path.name.startswith("0.")]
    # The lock, the record, two folded files, and three of the worker that lives.
    assert len(names) == 7, names


def test_a_silent_connection_keeps_nobody_waiting_and_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.metrics._Handler.timeout", 0.5)
    with (
        serve_metrics(("127.0.0.1", 0), Collector(tmp_path)) as port,
        socket.create_connection(("127.0.0.1", port), timeout=10) as silent,
    ):
        assert requests.get(f"http://127.0.0.1:{port}/metrics", timeout=5).status_code == 200
        assert silent.recv(1) == b""


def test_an_exporter_refuses_a_taken_port_and_gives_its_own_back(tmp_path: Path) -> None:
    collector = Collector(tmp_path)
    refused = r"cannot be served on http://127\.0\.0\.1:.* give another --metrics-port"
    with serve_metrics(("127.0.0.1", 0), collector) as port:
        again = serve_metrics(("127.0.0.1", port), collector)
        with pytest.raises(BeelineError, match=refused), again:
            raise AssertionError("two listen there")
    with serve_metrics(("127.0.0.1", port), collector):
        pass


class Watch:
    """Restarts under a clock that the test moves."""

    def __init__(self, wanted: int | None, living: str) -> None:
        self.now = 0.0
        self.restarts = Restarts(clock=lambda: self.now)
        if wanted is not None:
            self.restarts.expect(wanted)
        self.see(living)

    def see(self, living: str, dead: str = "", after: float = 1) -> int:
        """Report workers, each a letter; return the restarts."""
        self.now += after
        self.restarts.observe(set(living), set(dead))
        return self.restarts.count

    def later(self, living: str) -> int:
        return self.see(living, after=GRACE)


def test_a_lost_worker_is_one_restart_when_a_new_one_comes_or_after_a_while() -> None:
    replaced = Watch(2, "ab")
    assert [replaced.see("ab"), replaced.see("bc"), replaced.see("bc"), replaced.later("bc")] == [0, 1, 1, 1]
    missing = Watch(2, "ab")
    assert [missing.see("a"), missing.later("a")] == [0, 1]
    # A worker that comes late replaces one that is counted already.
    assert missing.later("ac") == 1
    nothing_wanted = Watch(None, "ab")
    assert [nothing_wanted.see("a"), nothing_wanted.later("a")] == [0, 1]


def test_scaling_is_no_restart_in_whatever_order_it_is_seen() -> None:
    asked_first = Watch(4, "abcd")
    asked_first.restarts.expect(2)
    assert [asked_first.see("abc"), asked_first.later("ab"), asked_first.later("ab")] == [0, 0, 0]
    seen_first = Watch(4, "abcd")
    seen_first.see("ab")
    seen_first.restarts.expect(2)
    assert seen_first.later("ab") == 0
    down_and_up = Watch(2, "ab")
    down_and_up.restarts.expect(1)
    down_and_up.restarts.expect(2)
    assert down_and_up.see("ac", dead="b") == 0
    up = Watch(1, "a")
    up.restarts.expect(3)
    assert [up.see("abc"), up.later("abc")] == [0, 0]


def test_scaling_down_explains_as_many_losses_as_were_asked_for_and_none_later() -> None:
    watch = Watch(4, "abcd")
    watch.restarts.expect(2)
    assert [watch.see("a"), watch.later("a"), watch.see("ae"), watch.see("ef")] == [0, 1, 1, 2]
    # One of the two that are to go has crashed before.
    crashed = Watch(3, "abc")
    assert [crashed.later("ab"), crashed.later("ab")] == [0, 1]
    crashed.restarts.expect(1)
    assert [crashed.see("a"), crashed.see("d")] == [1, 2]


def test_a_worker_that_comes_and_goes_between_two_looks_counts_and_only_once() -> None:
    watch = Watch(1, "a")
    assert [watch.see("c", dead="ab"), watch.later("c")] == [1, 2]
    once = Watch(1, "a")
    assert once.see("b", dead="a") == 1
    # Another process with its id may look like it for a moment.
    assert [once.see("ba"), once.see("b", dead="a"), once.see("b", dead="a", after=GRACE)] == [1, 1, 1]
