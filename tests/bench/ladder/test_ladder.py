"""A whole ladder of real archives in their sandbox: rows, out of memory, refusals, nothing left."""

from __future__ import annotations

import hashlib
import json
import signal
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from beeline.errors import ArchiveError, ConfigError, Undetermined
from bench.ladder import ladder, text
from bench.ladder.ladder import Worker
from bench.ladder.plan import Plan
from bench.ladder.row import OUT_OF_MEMORY, STAGES, Row
from tests.conftest import BLUE, GREEN, RED

# The project's handler around a fake engine, which loads at once and fails as the test says: no machine has so
# little memory that three small pictures do not fit.
FAKE = """
import os
import time
from types import SimpleNamespace

import numpy as np
import torch
from beeline.decoder import Decoder
from beeline.settings import Limits
from beeline.spec import ModelSpec
from beeline.metrics import Metrics
from vision_handler import VisionHandler


def fake(pixels):
    if FAILS:
        FAILURE
    return np.zeros((len(pixels), 3), np.float32)


class FakeEngine(VisionHandler):
    def load(self, folder, gpu_id=None):
        self.spec, self.limits = ModelSpec.load(folder), Limits.from_environment()
        values = {"device": "cpu", "precision": "fp32", "threads": "1"}
        choice = {name: SimpleNamespace(value=value, reason="fake") for name, value in values.items()}
        self.engine = SimpleNamespace(choice=choice, forward=fake, **{name: choice[name] for name in values})
        self.decoder = Decoder(self.spec.geometry, self.limits, 1)
        self.metrics = Metrics("fake", "1.0", {})
"""


@dataclass(frozen=True)
class Few:
    """Stands for the pictures of a folder: three of one colour each."""

    bodies: tuple[bytes, ...] = (RED, GREEN, BLUE)


def plan(archive: Path, **changes: object) -> Plan:
    """Return a short plan."""
    few: dict[str, object] = {"pictures": Few(), "device": "cpu", "repeats": 2, "most": 4, "mix": 4}
    return Plan(archive=archive, **{**few, **changes})  # type: ignore[arg-type]


def faking(failure: str = "pass", fails: str = "len(pixels) > 2") -> str:
    """Return the fake's source, failing with this statement where the expression holds."""
    return FAKE.replace("FAILS", fails).replace("FAILURE", failure)


def with_handler(archive: Path, target: Path, source: str) -> Path:
    """Return a copy of an archive with another handler file, recorded as a rebuild would."""
    with zipfile.ZipFile(archive) as old:
        files = {name: old.read(name) for name in old.namelist()}
    manifest = json.loads(files["MAR-INF/MANIFEST.json"])
    manifest["model"]["handler"] = "other.py"
    files["MAR-INF/MANIFEST.json"] = json.dumps(manifest).encode()
    files["other.py"] = source.encode()
    record = json.loads(files["checksums.json"])
    record["files"]["other.py"] = hashlib.sha256(source.encode()).hexdigest()
    files["checksums.json"] = json.dumps(record).encode()
    with zipfile.ZipFile(target, "w") as new:
        for name, data in files.items():
            new.writestr(name, data)
    return target


def children() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if "worker.py" in " ".join(each.cmdline())]


def test_each_batch_size_has_every_stage(colour_archive: Path) -> None:
    seen: list[Row] = []
    measured = ladder.measure(plan(colour_archive, least=4), seen.append)
    assert [row.batch for row in measured.rows] == [1, 2, 4]
    assert seen == list(measured.rows)
    for row in measured.rows:
        assert row.error is None
        assert row.repeats == 2
        for stage in STAGES:
            timing = row.stages[stage]
            assert 0 < timing.low_ms <= timing.median_ms <= timing.high_ms
            assert timing.ms_per_image == pytest.approx(timing.median_ms / row.batch, rel=0.01)
    assert not children()
    result = measured.to_dict()
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["model"], result["version"], result["classes"]) == ("colours", "1.0", 3)
    assert (result["device"], result["precision"], result["threads"]) == ("cpu", "fp32", 1)
    assert result["knee"] in (1, 2, 4)
    assert result["not_run"] == [{"what": "CUDA", "why": "cpu was asked for"}]
    assert set(result["fit"]) == {"forward", "handler"}
    lines = text.plain(result)
    assert "<- knee" in lines
    assert "whole handler" in lines
    assert "17.5 at batch 8, 13.75 at batch 32, worse at 64" in lines
    assert "CUDA: not run, cpu was asked for" in lines


@pytest.mark.parametrize("error", ["torch.OutOfMemoryError", "MemoryError"])
def test_out_of_memory_is_a_row(colour_archive: Path, tmp_path: Path, error: str) -> None:
    fake = with_handler(colour_archive, tmp_path / "fake.mar", faking(f"raise {error}('fake')"))
    measured = ladder.measure(plan(fake, least=64, most=64))
    assert [(row.batch, row.error) for row in measured.rows] == [(1, None), (2, None), (4, OUT_OF_MEMORY)]
    result = measured.to_dict()
    assert result["ended"] == OUT_OF_MEMORY
    assert result["rows"][-1] == {
        "batch": 4, "error": OUT_OF_MEMORY, "repeats": 0, **dict.fromkeys(STAGES)
    }  # fmt: skip
    assert "out of memory" in text.plain(result)


def test_a_real_memory_limit_gives_that_row_too(colour_archive: Path, tmp_path: Path) -> None:
    # 64 MiB a picture, written to.
    source = faking("np.ones(len(pixels) << 26, np.uint8)", "True")
    hungry = with_handler(colour_archive, tmp_path / "hungry.mar", source)
    measured = ladder.measure(plan(hungry, least=64, most=64, repeats=1, memory_mb=1200))
    assert measured.rows[-1].error == OUT_OF_MEMORY
    assert [row.error for row in measured.rows[:-1]] == [None] * (len(measured.rows) - 1)
    assert len(measured.rows) > 1


def test_a_worker_that_the_kernel_kills_gives_that_row_too(colour_archive: Path, tmp_path: Path) -> None:
    fake = with_handler(colour_archive, tmp_path / "killed.mar", faking("os.kill(os.getpid(), 9)"))
    measured = ladder.measure(plan(fake, least=64, most=64))
    assert [(row.batch, row.error) for row in measured.rows] == [(1, None), (2, None), (4, OUT_OF_MEMORY)]


def test_another_failure_is_an_error_with_its_batch_size(colour_archive: Path, tmp_path: Path) -> None:
    wrong = faking("raise ZeroDivisionError('fake')")
    with pytest.raises(ArchiveError, match="fails on a batch of 4: ZeroDivisionError: fake"):
        ladder.measure(plan(with_handler(colour_archive, tmp_path / "wrong.mar", wrong), least=64, most=64))
    assert not children()


def test_a_failure_inside_the_handler_alone_is_not_timed(colour_archive: Path, tmp_path: Path) -> None:
    """The handler answers each picture alone after it, which would be the time of another thing."""
    inside = "len(pixels) > 2 and '_answer' in [one.name for one in traceback.extract_stack()]"
    source = "import traceback" + faking("raise ZeroDivisionError('fake')", inside)
    with pytest.raises(ArchiveError, match="fails on a batch of 4: ZeroDivisionError"):
        ladder.measure(plan(with_handler(colour_archive, tmp_path / "inside.mar", source), least=64, most=64))


def test_a_picture_that_is_refused_is_named_before_anything_is_timed(colour_archive: Path, tmp_path: Path) -> None:
    fake = with_handler(colour_archive, tmp_path / "fake.mar", faking())
    with pytest.raises(ArchiveError, match=r"a picture of the mix is refused \(the body starts with b'no picture"):
        ladder.measure(plan(fake, pictures=Few((RED, b"no picture at all"))))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            "class Other:\n    def initialize(self, context): ...\n",
            "cannot be timed: ValueError: Other is no VisionHandler",
        ),
        ("", r"does not load: .*other\.py defines the classes none"),
        ("import no_such_module\n", "does not load: ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_a_handler_that_cannot_be_timed_is_refused(
    colour_archive: Path, tmp_path: Path, source: str, says: str
) -> None:
    with pytest.raises(ArchiveError, match=says):
        ladder.measure(plan(with_handler(colour_archive, tmp_path / "other.mar", source)))
    assert not children()


def test_a_device_that_is_not_there_is_refused(colour_archive: Path) -> None:
    with pytest.raises(ArchiveError, match="BEELINE_DEVICE is 'cuda:99'"):
        ladder.measure(plan(colour_archive, device="cuda:99"))


def test_a_changed_archive_is_refused(colour_archive: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.mar"
    changed.write_bytes(colour_archive.read_bytes())
    with zipfile.ZipFile(changed, "a") as archive:
        archive.writestr("numpy.py", "")
    with pytest.raises(ArchiveError, match=r"holds numpy\.py"):
        ladder.measure(plan(changed))


def test_no_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"is no \.mar file"):
        ladder.measure(plan(tmp_path))


def test_a_worker_that_ends_otherwise_is_no_row(colour_archive: Path, tmp_path: Path) -> None:
    with Worker(plan(with_handler(colour_archive, tmp_path / "fake.mar", faking()))) as worker:
        assert worker._process is not None
        worker._process.send_signal(signal.SIGTERM)
        with pytest.raises(Undetermined, match="ended with signal SIGTERM"):
            worker.measure(1)


def test_a_worker_that_hangs_is_given_up(colour_archive: Path, tmp_path: Path) -> None:
    hanging = with_handler(colour_archive, tmp_path / "hanging.mar", faking("time.sleep(3600)"))
    with Worker(plan(hanging)) as worker:
        worker._seconds = (300.0, 0.5)
        with pytest.raises(Undetermined, match=r"no reply within 0\.5 s"):
            worker.measure(4)
    assert not children()


def test_leaving_early_ends_the_worker_and_removes_what_it_unpacked(colour_archive: Path, tmp_path: Path) -> None:
    fake = with_handler(colour_archive, tmp_path / "fake.mar", faking())

    def stop(row: Row) -> None:
        raise KeyboardInterrupt

    before = set(Path(tempfile.gettempdir()).glob("beeline-sandbox-*"))
    with pytest.raises(KeyboardInterrupt):
        ladder.measure(plan(fake), stop)
    assert not children()
    assert set(Path(tempfile.gettempdir()).glob("beeline-sandbox-*")) <= before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"most": 0}, "most is 0"),
        ({"repeats": 0}, "repeats is 0"),
        ({"least": 8, "most": 4}, "least is 8 and most 4"),
        ({"memory_mb": 0}, "memory is 0 MB"),
    ],
)
def test_impossible_numbers_are_refused(tmp_path: Path, changes: dict[str, int], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        plan(tmp_path, **changes)


def test_the_mix_is_spread_over_the_folder_or_repeats_it(tmp_path: Path) -> None:
    many = Few(tuple(bytes([i]) for i in range(100)))
    assert plan(tmp_path, pictures=many, mix=4).bodies() == [b"\x00", b"\x19", b"\x32", b"\x4b"]
    assert plan(tmp_path, pictures=Few((b"a", b"b")), mix=5).bodies() == [b"a", b"b", b"a", b"b", b"a"]
