"""What a worker counts, and how it serves where it cannot count."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.multiprocess import MultiProcessCollector

from beeline.answer import Answer
from beeline.metrics import FOLDER, QUEUE_BUCKETS, Metrics, identity
from tests.conftest import RED, worker
from tests.handlers.test_vision_handler import ask
from tests.handlers.test_vision_handler import loaded as load_handler

CHOICE = {"device": {"value": "cpu", "reason": "no CUDA device is there"}}
OF_MODEL = {("model", "colours"), ("version", "1.0")}
STAGES = {"decode": 2.0, "forward": 40.0, "encode": 0.5, "unknown": 1.0}
GOOD, BAD = Answer(200, "OK", "{}"), Answer(415, "Unsupported Media Type", "{}", reason="not_an_image")


def read(folder: Path) -> dict[str, float]:
    """Return every sample of a folder by its name and its own label."""
    files = [str(path) for path in folder.glob("*.db")]
    found = {}
    for sample in (sample for family in MultiProcessCollector.merge(files) for sample in family.samples):
        own = [label for name, label in sample.labels.items() if (name, label) not in OF_MODEL]
        found[" ".join([sample.name, *own])] = sample.value
    return found


def loaded(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    assert path.stem == identity(os.getpid())
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def test_a_batch_is_counted_under_every_name(tmp_path: Path) -> None:
    worker(tmp_path, pid=os.getpid()).count([GOOD, GOOD, BAD], [None, 2.5, 70_000.0], STAGES)
    found = read(tmp_path)
    assert {
        name: number for name, number in found.items() if name.startswith(("beeline_answers", "beeline_errors"))
    } == {"beeline_answers_total 200": 2, "beeline_answers_total 415": 1, "beeline_errors_total not_an_image": 1}
    for name, value in {"batch_size": 3, "queue_seconds": 70.0025, "decode_seconds": 0.002}.items():
        assert found[f"beeline_{name}_sum"] == pytest.approx(value, abs=1e-5)
    # A minute in the queue has a bucket of its own.
    assert found["beeline_queue_seconds_bucket 120.0"] == found["beeline_queue_seconds_count"] == 2


def test_every_bound_is_inclusive(tmp_path: Path) -> None:
    metrics = worker(tmp_path, pid=os.getpid())
    for number, bound in enumerate(QUEUE_BUCKETS, 1):
        metrics.count([], [1000 * bound], {})
        assert read(tmp_path)[f"beeline_queue_seconds_bucket {float(bound)}"] == number


def test_a_worker_is_visible_before_its_first_batch(tmp_path: Path) -> None:
    worker(tmp_path, choice=CHOICE, pid=os.getpid())
    assert loaded(tmp_path) == {"model": "colours", "version": "1.0", "choice": CHOICE}
    found = read(tmp_path)
    assert found.pop("beeline_worker_starts_total") == 1
    assert set(found.values()) == {0}


def test_every_page_of_a_file_is_on_the_disk_before_the_first_count(tmp_path: Path) -> None:
    """A page that a full disk has no room for kills the worker at any later answer."""
    metrics = worker(tmp_path, pid=os.getpid())
    sizes = {path: (path.stat().st_size, path.stat().st_blocks) for path in tmp_path.glob("*.db")}
    assert all(512 * blocks >= size == 1 << 16 for size, blocks in sizes.values())
    for status in range(400, 440):
        metrics.count([Answer(status, "", "", reason=f"a_reason_of_{status}")], [1.0], STAGES)
    assert {path: (path.stat().st_size, path.stat().st_blocks) for path in sizes} == sizes
    assert sum(number for name, number in read(tmp_path).items() if name.startswith("beeline_answers")) == 40


def test_without_a_folder_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    Metrics("colours", "1.0", CHOICE).count([GOOD], [1.0], STAGES)


@pytest.mark.parametrize(("folder", "sentence"), [("", "import of prometheus_client"), ("gone", "it cannot count in")])
def test_without_the_library_or_the_folder_it_serves_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, folder: str, sentence: str
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    metrics = worker(tmp_path / folder, choice=CHOICE, pid=os.getpid())
    for _ in range(3):
        metrics.count([GOOD], [1.0], STAGES)
    (record,) = caplog.records
    assert f"this worker serves without metrics: {sentence}" in record.message
    assert list(tmp_path.glob("*.db")) == []
    assert folder or loaded(tmp_path)["choice"] == CHOICE


def test_what_cannot_be_counted_costs_no_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics = worker(tmp_path)
    metrics.count([Answer(400, "", "", reason="\ud800")], [1.0], STAGES)
    assert read(tmp_path)["beeline_errors_total ?"] == 1
    for _ in range(2):
        metrics.count([GOOD], ["a moment"], STAGES)  # type: ignore[list-item]
    assert [record.message for record in caplog.records] == ["this worker counts no more"]


def test_the_handler_counts_what_it_answered(
    colour_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    handler = load_handler(colour_model)
    values = loaded(tmp_path)
    assert (values["model"], values["version"]) == ("colours", "1.0")
    assert list(values["choice"]) == ["engine", "device", "precision", "threads", "decoding"]
    assert all(made["value"] and made["reason"] for made in values["choice"].values())
    ask(handler, [{"body": RED}, {"body": b"junk"}], [{"X-Request-Start": f"t={time.time() - 20:.3f}"}, {}])
    found = read(tmp_path)
    assert (found["beeline_answers_total 200"], found["beeline_answers_total 415"]) == (1, 1)
    assert found["beeline_errors_total not_an_image"] == 1
    assert (found["beeline_batch_size_bucket 1.0"], found["beeline_batch_size_bucket 2.0"]) == (0, 1)
    assert found["beeline_queue_seconds_count"] == 1
    assert found["beeline_queue_seconds_sum"] > 19
