"""Several configurations of one model side by side on real servers, each with its own numbers."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from archive import store
from beeline.errors import ArchiveError, ConfigError
from bench.pictures import Pictures
from bench.tune import ladder, model, variants
from bench.tune.goal import Goal
from bench.tune.settings import Settings
from bench.tune.stand import Stand, together
from host import processes
from serve import properties
from serve.client import ManagementClient
from serve.instance import MARK
from tests.conftest import BLUE, GREEN, ROOT, write_archive

GOAL = Goal(p95_ms=30_000, clients=8)
SMALL, LARGE = Settings(2, 2, 2, 1), Settings(8, 1, 5, 1)
CONFIG = ROOT / "config" / "config.properties"


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short folder for everything temporary: sockets have short paths."""
    folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp")).resolve()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    for name in ("BATCH_SIZE", "WORKERS", "LINGER_MS"):
        monkeypatch.delenv(name, raising=False)
    yield folder
    processes.stop_marked(MARK, str(folder), grace=0, folder=folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.bench
@pytest.mark.parametrize("server", ["torchserve", "mms"])
def test_configurations_stand_side_by_side(temporary: Path, colour_archive: Path, server: str) -> None:
    found = model.find(str(colour_archive), colour_archive.parent, CONFIG, {})
    sent = Pictures("some", ("a.png", "b.png"), (BLUE, GREEN))
    with Stand(found, GOAL, sent, server, ladder.UNKNOWN, print) as stand:
        stand.open([SMALL, LARGE])
        (running,) = stand._servers
        for settings in (SMALL, LARGE):
            summary = stand.run(settings, 1.5, 1.0)
            assert summary["failed"] == 0
            assert summary["good_per_second"] > 0
            assert max(map(int, summary["batch_sizes"])) <= settings.batch_size
        assert running.state.environment["BEELINE_THREADS"] == "1"
        with ManagementClient(running.state.management) as management:
            described = management.describe(SMALL.label)
            assert described is not None
            assert (described.batch_size, described.max_batch_delay, described.ready) == (2, 2, 2)
            smaller = stand.shrink(SMALL, 1)
            assert smaller == Settings(2, 1, 2, 1)
            assert stand.run(smaller, 1.0, 0.5)["failed"] == 0
            stand.close(LARGE)
            closed = management.describe(LARGE.label)
            assert closed is None or closed.max_workers == 0
        # A second server beside the first.
        other = Settings(4, 1, 2, 2)
        stand.open([other])
        assert stand.run(other, 1.0, 0.5)["failed"] == 0
        assert stand.run(smaller, 1.0, 0.5)["failed"] == 0
    assert processes.marked(MARK, str(temporary), temporary) == []
    assert [path.name for path in temporary.iterdir() if path.name.startswith("beeline-")] == []


def test_few_workers_start_side_by_side() -> None:
    one, two, three = Settings(8, 2, 2, 1), Settings(8, 1, 2, 2), Settings(16, 2, 2, 1)
    assert together([one, two, three], 4) == [[one, three], [two]]
    assert together([one, two, three], 3) == [[one], [three], [two]]
    assert together([one], 1) == [[one]]


def test_the_archives_golden_pictures_are_sent_where_none_are_given(colour_archive: Path) -> None:
    found = model.find(str(colour_archive), colour_archive.parent, CONFIG, {})
    assert model.sent(found, None, None).names == ("0.png", "1.png")
    with pytest.raises(ConfigError, match="--picture and --pictures are both given"):
        model.sent(found, Path("a"), Path("b"))


def test_what_is_configured_now_comes_from_file_and_environment(colour_archive: Path) -> None:
    environ = {"BATCH_SIZE": "3", "WORKERS": "2", "BEELINE_THREADS": "4", "BEELINE_DEVICE": "cpu"}
    found = model.find("colours", colour_archive.parent, CONFIG, environ)
    assert found.configured == Settings(3, 2, 2, 4)
    assert found.reason == "environment BEELINE_THREADS"


def test_an_archive_of_another_make_is_refused(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "other.mar", "other", {"model.pt": b"x", "h.py": b""}, "h.py")
    with pytest.raises(ArchiveError, match=r"holds no checksums\.json; build it with"):
        model.find(str(path), tmp_path, CONFIG, {})


def test_the_variants_are_the_archive_under_other_names(tmp_path: Path, colour_archive: Path) -> None:
    found = model.find(str(colour_archive), colour_archive.parent, CONFIG, {"BEELINE_JOB_QUEUE_SIZE": "77"})
    paths, config = variants.write(found, [SMALL, LARGE], tmp_path)
    archives = store.find(tmp_path, [str(path) for path in paths])
    assert [archive.model for archive in archives] == [SMALL.label, LARGE.label]
    read = properties.load(config)
    assert read.numbers["beeline_threads"] == 1
    assert read.numbers["job_queue_size"] == 77
    assert read.addresses == {}
    entry = read.models[SMALL.label]["1.0"].numbers
    assert (entry["batchSize"], entry["minWorkers"], entry["maxBatchDelay"]) == (2, 2, 2)
    environ = variants.environment({"BEELINE_THREADS": "9", "BATCH_SIZE": "7", "BEELINE_DEVICE": "cpu", "PATH": "x"})
    assert environ == {"BEELINE_DEVICE": "cpu", "PATH": "x"}


def test_a_ladder_tells_points_and_what_a_worker_takes(colour_archive: Path) -> None:
    found = model.find(str(colour_archive), colour_archive.parent, CONFIG, {})
    points: dict[int, float] = {}
    with model.unpacked(found) as folder:
        cost = ladder.climb(folder, model.sent(found, None, None), 1, 20.0, points.__setitem__, (1, 4))
    assert set(points) == {1, 4}
    assert all(value > 0 for value in points.values())
    assert cost is not None
    assert cost.memory > 100 << 20
    assert os.path.lexists(folder) is False
