"""What a worker counts, and when and where it writes it."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ts.context import Context, RequestProcessor

from beeline import metrics as module
from beeline.answer import Answer
from beeline.metrics import Histogram, Metrics
from tests.conftest import RED
from vision_handler import VisionHandler

CHOICE = {"device": {"value": "cpu", "reason": "no CUDA device is there"}}
STAGES = {"decode": 2.0, "forward": 40.0, "encode": 0.05}
GOOD, BAD = Answer(200, "OK", "{}"), Answer(415, "Unsupported Media Type", "{}", reason="not_an_image")


def wait_until(true: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.01)


def read(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def test_a_histogram_counts_up_to_and_including_its_bounds() -> None:
    histogram = Histogram((1, 2.5))
    for value in (0, 1, 1.1, 2.5, 2.6, 100):
        histogram.observe(value)
    assert histogram.to_dict() == {"bounds": [1, 2.5], "counts": [2, 2, 2], "sum": 107.2}


def test_a_batch_is_counted_under_every_name(tmp_path: Path) -> None:
    metrics = Metrics("colours", "1.0", CHOICE, tmp_path)
    metrics.count([GOOD, GOOD, BAD], [None, 3.0, 70_000.0], STAGES)
    values = metrics.to_dict()
    assert values["answers"] == {"200": 2, "415": 1}
    assert values["reasons"] == {"not_an_image": 1}
    sums = {name: (sum(each["counts"]), each["sum"]) for name, each in values["histograms"].items()}
    assert sums == {
        "batch_size": (1, 3),
        "queue_milliseconds": (2, 70_003),
        "decode_milliseconds": (1, 2),
        "forward_milliseconds": (1, 40),
        "encode_milliseconds": (1, 0.05),
    }
    # A minute in the queue is not the last bucket of all.
    assert values["histograms"]["queue_milliseconds"]["counts"][-1] == 0


def test_a_worker_is_seen_before_its_first_batch(tmp_path: Path) -> None:
    before = time.time()
    Metrics("colours", "1.0", CHOICE, tmp_path).start()
    values = read(tmp_path)
    assert before <= values.pop("started") <= time.time()
    assert values.pop("histograms").keys() == {
        "batch_size",
        *(f"{name}_milliseconds" for name in ("queue", "decode", "forward", "encode")),
    }
    assert values == {
        "pid": os.getpid(),
        "model": "colours",
        "version": "1.0",
        "choice": CHOICE,
        "answers": {},
        "reasons": {},
    }


def test_the_last_batch_of_a_burst_is_written_without_another(tmp_path: Path) -> None:
    metrics = Metrics("colours", "1.0", CHOICE, tmp_path)
    metrics.start()
    for _ in range(1000):
        metrics.count([GOOD], [None], STAGES)
    wait_until(lambda: read(tmp_path)["answers"] == {"200": 1000})


def test_no_reader_ever_sees_half_a_file(tmp_path: Path) -> None:
    metrics = Metrics("colours", "1.0", CHOICE, tmp_path)
    metrics.start()

    def work() -> None:
        for _ in range(500):
            metrics.count([GOOD], [], STAGES)
            metrics.write()

    worker = threading.Thread(target=work)
    worker.start()
    seen = []
    while worker.is_alive():
        seen.append(read(tmp_path)["answers"].get("200", 0))
    worker.join()
    assert seen == sorted(seen)
    assert read(tmp_path)["answers"]["200"] == 500


def test_a_worker_with_a_dead_ones_process_id_leaves_its_counts_alone(tmp_path: Path) -> None:
    for _ in range(2):
        metrics = Metrics("colours", "1.0", CHOICE, tmp_path)
        metrics.count([GOOD], [None], STAGES)
        metrics.write()
    assert [json.loads(path.read_text())["answers"] for path in tmp_path.iterdir()] == [{"200": 1}] * 2


def test_without_a_folder_it_counts_in_memory(tmp_path: Path) -> None:
    metrics = Metrics.from_environment("colours", "1.0", CHOICE, {})
    metrics.start()
    metrics.count([GOOD], [1.0], STAGES)
    metrics.write()
    assert metrics.path is None
    assert metrics.to_dict()["answers"] == {"200": 1}


def test_a_disk_that_fails_is_told_once_and_caught_up_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY", 0.01)
    folder = tmp_path / "not there yet"
    metrics = Metrics("colours", "1.0", CHOICE, folder)
    with caplog.at_level(logging.ERROR, logger="beeline.metrics"):
        metrics.start()
        for _ in range(20):
            metrics.count([GOOD], [None], STAGES)
            time.sleep(0.01)
    folder.mkdir()
    wait_until(lambda: len(list(folder.glob("*.json"))) == 1 and read(folder)["answers"] == {"200": 20})
    assert [record.message for record in caplog.records] == [f"the metrics cannot be written to {metrics.path}"]


def test_the_handler_counts_what_it_answered(
    colour_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEELINE_METRICS_DIR", str(tmp_path))
    handler = VisionHandler()
    handler.initialize(Context("colours", str(colour_model), {}, 8, None, "0.12.0"))
    loaded = read(tmp_path)
    assert (loaded["model"], loaded["version"], loaded["answers"]) == ("colours", "1.0", {})
    assert {name: made["value"] for name, made in loaded["choice"].items()} == {
        "engine": "torch",
        "device": handler.engine.choice["device"].value,
        "precision": "fp32",
        "threads": handler.engine.choice["threads"].value,
        "decoding": "full",
    }
    assert all(made["reason"] for made in loaded["choice"].values())
    context = Context("colours", "", {}, 8, None, "0.12.0")
    headers = [{"X-Request-Start": f"t={time.time() - 20:.3f}"}, {}]
    context.request_processor = [RequestProcessor(header) for header in headers]
    handler.handle([{"body": RED}, {"body": b"junk"}], context)
    wait_until(lambda: bool(read(tmp_path)["answers"]))
    counts = read(tmp_path)
    assert counts["answers"] == {"200": 1, "415": 1}
    assert counts["reasons"] == {"not_an_image": 1}
    assert counts["histograms"]["batch_size"]["counts"][1] == 1
    assert sum(counts["histograms"]["queue_milliseconds"]["counts"]) == 1
    assert counts["histograms"]["queue_milliseconds"]["sum"] > 19_000
