"""Counts: workers' files are read, those of ended workers are folded, and foreign files are only counted."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.mmap_dict import MmapedDict

from beeline.answer import Answer
from beeline.errors import BeelineError
from beeline.metrics import identity
from serve import counts
from serve.metrics import Collector
from tests.conftest import worker

BATCH = [Answer(200, "OK", "{}")] * 3


def fold(folder: Path) -> None:
    with counts.lock(folder):
        counts.fold(folder, counts.scan(folder))


def sums(folder: Path) -> dict[Any, float]:
    """Return every sample of a folder."""
    with counts.lock(folder):
        families = counts.scan(folder).families()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def chose(device: str) -> dict[str, dict[str, str]]:
    return {"device": {"value": device, "reason": "asked for"}}


def test_what_the_handler_writes_is_read(tmp_path: Path) -> None:
    worker(tmp_path, choice=chose("cpu"), pid=os.getpid()).count(BATCH, [2000.0], {"forward": 3.0})
    found = counts.read(tmp_path)
    assert found.living() == [counts.Worker(identity(os.getpid()), ("colours", "1.0"), chose("cpu"))]
    assert (found.unreadable, found.counting()) == (0, {("colours", "1.0")})
    assert sums(tmp_path)["beeline_queue_seconds_sum", frozenset({("model", "colours"), ("version", "1.0")})] == 2


def test_answers_of_all_workers_are_added_up_folded_ones_too(tmp_path: Path) -> None:
    worker(tmp_path).count([*BATCH, Answer(415, "", "")], [], {})
    fold(tmp_path)
    worker(tmp_path, version="2.0").count(BATCH, [], {})
    worker(tmp_path, "other", pid=os.getpid()).count([Answer(500, "", "")], [], {})
    assert counts.answers(tmp_path) == {"colours": {"200": 6, "415": 1}, "other": {"500": 1}}


def test_foreign_files_are_skipped_and_counted(tmp_path: Path) -> None:
    workers = [b'{"pid": 1, "mod', b"[" * 100_000, b"\xff\xfe", b"[]"]
    workers += [b'{"model": "a", "version": "1", "choice": {"device": "cpu"}}']
    workers += [
        b'{"model": %s, "version": "1", "choice": {}}' % model for model in (b"5", b'["x"]', b"null", rb'"\ud800"')
    ]
    files = {f"{number}-1.json": content for number, content in enumerate(workers)}
    files |= {"notes.txt": b"mine", "gauge_all_1.db": bytes(100), "counter_1-1.db": b"mine", "counter_2-1.db": b""}
    files["histogram_1-1.db"] = b"\x40" + bytes(7) + b"\x08" + bytes(3) + b"no JSON!" + bytes(90)
    for name, content in {**files, "draft.tmp": b"being written"}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "histogram_2-1.db").mkdir()
    (tmp_path / "histogram_3-1.db").symlink_to(tmp_path / "nothing")
    # A reader would wait for ever for a writer.
    os.mkfifo(tmp_path / "counter_3-1.db")
    found = counts.read(tmp_path)
    list(found.families())
    assert (found.workers, found.unreadable) == ([], 17)
    worker(tmp_path).count(BATCH, [], {})
    fold(tmp_path)
    assert counts.answers(tmp_path) == {"colours": {"200": 3}}
    found = counts.read(tmp_path)
    # Files with the name of an ended worker are removed, so that the folding comes to an end.
    assert (found.ended, found.unreadable) == (set(), 12)


def test_without_a_folder_or_without_files_of_counts_nobody_counts(tmp_path: Path) -> None:
    assert counts.read(tmp_path / "nothing") == counts.Counts()
    assert counts.answers(tmp_path / "nothing") is None
    worker(tmp_path, pid=os.getpid())
    for path in tmp_path.glob("*.db"):
        path.unlink()
    found = counts.read(tmp_path)
    assert (len(found.living()), found.counting(), counts.answers(tmp_path)) == (1, set(), None)


def test_a_worker_lives_as_long_as_its_process(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "1000"]) as process:
        worker(tmp_path, pid=process.pid)
        assert len(counts.read(tmp_path).living()) == 1
        process.kill()
        # Nobody has waited for it yet: a zombie is no worker.
        deadline = time.monotonic() + 10
        while identity(process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert counts.read(tmp_path).living() == []
    assert counts.read(tmp_path).living() == []


def test_a_process_with_a_dead_workers_id_is_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker(tmp_path, pid=os.getpid()).count(BATCH, [], {})
    monkeypatch.setattr(counts, "identity", lambda pid: f"{pid}-{2**40}")
    assert counts.read(tmp_path).living() == []
    fold(tmp_path)
    assert list(tmp_path.glob(f"*{os.getpid()}*")) == []
    assert counts.answers(tmp_path) == {"colours": {"200": 3}}


def test_the_choices_are_those_of_the_latest_living_workers(tmp_path: Path) -> None:
    worker(tmp_path, choice=chose("cuda:1"), pid=os.getpid())
    worker(tmp_path, choice=chose("cuda:0"), pid=os.getppid())
    worker(tmp_path, choice=chose("cuda:2"))
    worker(tmp_path, version="2.0", choice=chose("cuda:3"))
    assert counts.read(tmp_path).choices() == {("colours", "1.0"): chose("cuda:1")}


def test_a_gateway_killed_at_any_step_of_folding_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in itertools.count():
        folder = tmp_path / str(number)
        folder.mkdir()
        for _ in range(2):
            worker(folder).count(BATCH, [1.0], {"forward": 3.0})
            fold(folder)
        worker(folder).count(BATCH, [1.0], {"forward": 3.0})
        before, steps = sums(folder), iter(range(number))

        def step(call: Any, left: Any = steps) -> Any:
            def stepped(*args: Any, **options: Any) -> Any:
                if next(left, None) is None:
                    raise KeyboardInterrupt
                return call(*args, **options)

            return stepped

        with monkeypatch.context() as patch:
            for name in ("write_whole", "write_json"):
                patch.setattr(counts, name, step(getattr(counts, name)))
            patch.setattr(Path, "unlink", step(Path.unlink))
            try:
                fold(folder)
                whole = True
            except KeyboardInterrupt:
                whole = False
        assert sums(folder) == before
        fold(folder)
        assert sums(folder) == before
        assert len(list(folder.iterdir())) == 4
        if whole:
            break
    assert number > 5


def test_the_folder_is_emptied_unless_one_of_its_workers_lives(tmp_path: Path) -> None:
    folder = tmp_path / "metrics"
    counts.empty(folder)
    worker(folder)
    counts.empty(folder)
    assert list(folder.iterdir()) == []
    worker(folder, pid=os.getpid())
    with pytest.raises(BeelineError, match=rf"still count in .*metrics \({identity(os.getpid())}, each .* end them"):
        counts.empty(folder)
    assert len(list(folder.glob(f"*{identity(os.getpid())}*"))) == 3


def test_an_error_of_the_disk_loses_no_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker(tmp_path).count(BATCH, [], {})
    worker(tmp_path, pid=os.getpid()).count(BATCH, [], {})

    def fail(path: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as broken:
        broken.setattr("prometheus_client.mmap_dict.MmapedDict.read_all_values_from_file", fail)
        with pytest.raises(OSError, match="Too many"):
            fold(tmp_path)
        with pytest.raises(OSError, match="Too many"):
            sums(tmp_path)
    fold(tmp_path)
    assert counts.answers(tmp_path) == {"colours": {"200": 6}}


@pytest.mark.parametrize(
    ("labels", "value"),
    [
        ({"model": "a", "version": "1", "status": "200"}, math.nan),
        ({"model": "a", "version": "1", "status": "200"}, math.inf),
        ({"model": "\ud800", "version": "1", "status": "200"}, 1.0),
        ({"version": "1", "status": "200"}, 1.0),
    ],
)
def test_counts_that_no_worker_writes_are_unreadable(tmp_path: Path, labels: dict[str, str], value: float) -> None:
    worker(tmp_path, pid=os.getpid()).count(BATCH, [], {})
    foreign = MmapedDict(str(tmp_path / "counter_1-1.db"))
    foreign.write_value(json.dumps(["beeline_answers", "beeline_answers_total", labels, ""]), value, 0.0)
    foreign.close()
    assert counts.answers(tmp_path) == {"colours": {"200": 3}}
    registry = CollectorRegistry()
    registry.register(Collector(tmp_path))
    assert b"beeline_metrics_files_unreadable 1.0" in generate_latest(registry)
