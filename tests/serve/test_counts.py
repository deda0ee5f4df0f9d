"""Reading what workers counted: the handler's own form, and nothing else that lies beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from beeline.metrics import Metrics
from serve.counts import choices, living, load, scan

BEGAN = psutil.Process().create_time()


def write(folder: Path, name: str = "1-1.json", **changes: object) -> Path:
    """Write a file as the handler writes it, with some of its values changed."""
    values = Metrics("colours", "1.0", {"device": {"value": "cpu", "reason": "asked for"}}).to_dict()
    path = folder / name
    path.write_text(json.dumps({**values, "pid": os.getpid(), "started": time.time(), **changes}))
    return path


def test_what_the_handler_writes_is_read(tmp_path: Path) -> None:
    metrics = Metrics("colours", "1.0", {"device": {"value": "cpu", "reason": "asked for"}}, tmp_path)
    metrics.count([], [2000.0], {"forward": 3.0})
    metrics.write()
    (worker,) = load(tmp_path)
    assert (worker.pid, worker.started, worker.key) == (os.getpid(), metrics.started, ("colours", "1.0"))
    assert worker.choice == {"device": {"value": "cpu", "reason": "asked for"}}
    assert worker.histograms["queue_milliseconds"].total == 2000
    assert sum(worker.histograms["forward_milliseconds"].counts) == 1
    assert scan(tmp_path) == ([worker], 0)


FOREIGN: dict[str, Any] = {
    "a negative count": {"answers": {"200": -1}},
    "a count that is no number": {"answers": {"200": "1"}},
    "a count that is a truth": {"reasons": {"x": True}},
    "an endless number": {"answers": {"200": 10**400}},
    "counts in a list": {"answers": [1]},
    "nothing": {"answers": None},
    "no time": {"started": float("nan")},
    "an endless time": {"started": float("inf")},
    "a time of many digits": {"started": 10**400},
    "a lone surrogate": {"model": "\ud800"},
    "a model without a name": {"model": None},
    "a choice without a reason": {"choice": {"device": {"value": "cpu"}}},
    "bounds in disorder": {"histograms": {"batch_size": {"bounds": [2, 1], "counts": [0, 0, 0], "sum": 0}}},
    "a bucket too few": {"histograms": {"batch_size": {"bounds": [1, 2], "counts": [0, 0], "sum": 0}}},
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_file_of_another_form_is_passed_over_and_counted(tmp_path: Path, what: str) -> None:
    write(tmp_path, **FOREIGN[what])
    write(tmp_path, "2-2.json")
    workers, unreadable = scan(tmp_path)
    assert [worker.file for worker in workers] == ["2-2.json"]
    assert unreadable == 1


def test_whatever_lies_beside_them_is_passed_over_and_counted(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text('{"pid": 1, "mod')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "huge.json").write_text(" " * 2_000_000)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "nowhere.json").symlink_to(tmp_path / "nothing")
    # A reader would wait for ever for somebody who writes.
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "draft.tmp").write_text("being written")
    assert scan(tmp_path) == ([], 9)


def test_without_a_folder_there_are_none(tmp_path: Path) -> None:
    assert scan(tmp_path / "nothing") == ([], 0)
    (tmp_path / "file").touch()
    assert scan(tmp_path / "file") == ([], 1)


def test_a_file_is_read_again_when_it_changed(tmp_path: Path) -> None:
    metrics = Metrics("colours", "1.0", {}, tmp_path)
    for number in range(20):
        metrics.answers["200"] = number
        metrics.write()
        assert load(tmp_path)[0].answers == {"200": number}


def test_a_worker_lives_as_long_as_its_process(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with process:
        write(tmp_path, pid=process.pid)
        assert len(living(load(tmp_path))) == 1
        process.kill()
        # A zombie is no worker: nobody has waited for it yet.
        deadline = time.monotonic() + 10
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.01)
        assert living(load(tmp_path)) == []
    assert living(load(tmp_path)) == []


@pytest.mark.parametrize(("later", "lives"), [(0, True), (1000, True), (-1000, False)])
def test_somebody_elses_process_with_a_dead_workers_id_is_no_worker(tmp_path: Path, later: float, lives: bool) -> None:
    write(tmp_path, started=BEGAN + later)
    assert bool(living(load(tmp_path))) is lives


def test_of_two_workers_with_one_id_the_later_lives(tmp_path: Path) -> None:
    write(tmp_path, "1-2.json", started=BEGAN + 2)
    write(tmp_path, "1-1.json", started=BEGAN + 1)
    assert [worker.file for worker in living(load(tmp_path))] == ["1-2.json"]


def test_the_choices_are_the_latest_living_workers(tmp_path: Path) -> None:
    def chose(value: str) -> dict[str, dict[str, str]]:
        return {"device": {"value": value, "reason": "asked for"}}

    write(tmp_path, "1.json", started=BEGAN + 1, choice=chose("cuda:0"), pid=os.getppid())
    write(tmp_path, "2.json", started=BEGAN + 2, choice=chose("cuda:1"))
    write(tmp_path, "3.json", started=BEGAN + 3, choice=chose("cuda:2"), pid=2**30)
    write(tmp_path, "4.json", started=BEGAN + 3, choice=chose("cuda:3"), pid=2**30, version="2.0")
    assert choices(tmp_path) == {("colours", "1.0"): chose("cuda:1")}
