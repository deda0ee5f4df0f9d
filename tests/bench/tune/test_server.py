"""Several configurations of one model side by side on real servers, each with its own numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from archive import mar, store
from beeline.errors import ArchiveError
from bench import pictures as files
from bench.pictures import Pictures
from bench.record import Journal
from bench.tune.grid import Goal, Settings
from bench.tune.server import Servers, configuration, find_model
from serve import properties
from serve.client import ManagementClient
from tests.bench.tune.conftest import left
from tests.conftest import BLUE, GREEN, ROOT, write_archive

GOAL = Goal(p95_ms=30_000, clients=8)
SMALL, LARGE = Settings(2, 2, 2, 1), Settings(8, 1, 5, 1)
CONFIG = ROOT / "config" / "config.properties"


@pytest.mark.bench
@pytest.mark.parametrize("server", ["torchserve", "mms"])
def test_configurations_answer_on_one_server_each_with_its_own_numbers(
    temporary: Path, colour_archive: Path, server: str
) -> None:
    found = find_model(str(colour_archive), colour_archive.parent, CONFIG, {})
    sent = Pictures("some", ("a.png", "b.png"), (BLUE, GREEN))
    with Servers(found, GOAL, sent, server, Journal.job(temporary / "a.journal", {})) as opened:
        opened.open([SMALL, LARGE])
        running = opened.running[SMALL]
        for settings in (SMALL, LARGE):
            turn = opened.run(settings, 1.5, 1.0)
            assert (turn.settings, turn.failed) == (settings, 0)
            assert turn.per_second > 0
            assert turn.cost == pytest.approx(1000 * GOAL.clients / turn.per_second)
        assert running.state.environment["BEELINE_THREADS"] == "1"
        with ManagementClient(running.state.management) as management:
            described = management.describe(SMALL.label)
            assert described is not None
            assert (described.batch_size, described.max_batch_delay, described.ready) == (2, 2, 2)
        # A second server beside the first, and no third where memory holds but three workers.
        other = Settings(4, 1, 2, 2)
        opened.open([SMALL, other])
        assert opened.run(other, 1.0, 0.5).failed == opened.run(SMALL, 1.0, 0.5).failed == 0
        assert set(opened.running) == {SMALL, LARGE, other}
        opened.journal.add("cost", {"memory": 1, "load_seconds": 1.0, "device_memory": 10, "device_free": 40})
        assert opened.room() == 3
        opened.open([SMALL, LARGE])
        assert set(opened.running) == {SMALL, LARGE}
        opened.stop()
        assert left(temporary) == []


def test_what_is_configured_now_comes_from_file_and_environment(colour_archive: Path) -> None:
    environ = {"BATCH_SIZE": "3", "WORKERS": "2", "BEELINE_THREADS": "4", "BEELINE_DEVICE": "cpu"}
    found = find_model("colours", colour_archive.parent, CONFIG, environ)
    assert found.configured == Settings(3, 2, 2, 4)


def test_an_archive_that_beeline_did_not_build_is_refused(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "other.mar", "other", {"model.pt": b"x", "h.py": b""}, "h.py")
    with pytest.raises(ArchiveError, match=r"holds no checksums\.json; build it with"):
        find_model(str(path), tmp_path, CONFIG, {})


def test_the_variants_are_the_archive_under_other_names(tmp_path: Path, colour_archive: Path) -> None:
    found = find_model(str(colour_archive), colour_archive.parent, CONFIG, {"BEELINE_JOB_QUEUE_SIZE": "77"})
    paths = [mar.renamed(found.archive.path, settings.label, tmp_path) for settings in (SMALL, LARGE)]
    archives = store.find_archives(tmp_path, [str(path) for path in paths])
    assert [archive.model for archive in archives] == [SMALL.label, LARGE.label]
    read = properties.load(configuration(found, [SMALL, LARGE], tmp_path))
    assert read.numbers["beeline_threads"] == 1
    assert read.numbers["job_queue_size"] == 77
    assert read.addresses == {}
    entry = read.models[SMALL.label]["1.0"].numbers
    assert (entry["batchSize"], entry["minWorkers"], entry["maxBatchDelay"]) == (2, 2, 2)


def test_a_batch_is_timed_and_says_what_a_worker_takes(tmp_path: Path, colour_archive: Path) -> None:
    found = find_model(str(colour_archive), colour_archive.parent, CONFIG, {})
    journal = Journal.job(tmp_path / "j", {})
    Servers(found, GOAL, files.choose(None, None, found.archive), "torchserve", journal).time_batches(1, 5.0)
    assert {1, 2} <= {size for threads, size, ms in journal.of("batch") if threads == 1 and ms > 0}
    assert journal.of("cost")[-1]["memory"] > 100 << 20
