"""Batch sweeps: where they end and what they find, and real archives in a sandbox that leaves nothing."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import zipfile
from pathlib import Path
from typing import Any

import psutil
import pytest

from beeline.errors import ArchiveError, Undetermined
from bench import sweep
from bench.pictures import Pictures
from bench.record import Record
from bench.report import text
from bench.sweep import OUT_OF_MEMORY, STAGES, Plan, Row, end, fit, is_flat, knee, timing
from tests.conftest import BLUE, GREEN, RED

# The project's handler around a fake engine, which loads at once and fails as the test says.
FAKE = """
import os
import time
from types import SimpleNamespace

import numpy as np
import torch
from beeline import tasks
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
        self.task = tasks.of(self.spec)
        self.task.load(folder, self.engine)
        self.decoder = Decoder(self.spec.geometry, self.limits, 1)
        self.metrics = Metrics("fake", "1.0", {})
"""


def few(*bodies: bytes) -> Pictures:
    return Pictures("few", ("a.png",) * len(bodies), bodies)


def plan(archive: Path, **changes: object) -> Plan:
    """Return a short plan."""
    short: dict[str, Any] = {"pictures": few(RED, GREEN, BLUE), "device": "cpu", "repeats": 2, "most": 4, "mix": 4}
    return Plan(archive, **{**short, **changes})


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
    rows: list[Row] = []
    result, interruption = sweep.measure(plan(colour_archive, least=4), rows.append)
    assert interruption is None
    assert [row["batch"] for row in rows] == [1, 2, 4]
    assert result["rows"] == rows
    for row in rows:
        assert (row["error"], row["repeats"]) == (None, 2)
        for stage in STAGES:
            assert 0 < row[stage]["low_ms"] <= row[stage]["median_ms"] <= row[stage]["high_ms"]
            assert row[stage]["ms_per_image"] == pytest.approx(row[stage]["median_ms"] / row["batch"], rel=0.01)
    assert not children()
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["model"], result["version"], result["classes"]) == ("colours", "1.0", 3)
    assert (result["device"], result["precision"], result["threads"]) == ("cpu", "fp32", 1)
    assert result["knee"] in (1, 2, 4)
    assert result["not_run"] == [{"what": "CUDA", "why": result["reasons"]["device"]}]
    assert set(result["fit"]) == {"forward", "handler"}
    said = text(Record.now("sweep", "", result, None))
    assert "+ copy  " in said
    assert re.search(r"(?m)^\* +\d", said), "no knee is marked"


@pytest.mark.parametrize("failure", ["raise torch.OutOfMemoryError()", "os.kill(os.getpid(), 9)"])
def test_a_batch_that_is_out_of_memory_is_a_row(colour_archive: Path, tmp_path: Path, failure: str) -> None:
    hungry = with_handler(colour_archive, tmp_path / "a.mar", faking(failure))
    result, _ = sweep.measure(plan(hungry, least=64, most=64))
    assert [(row["batch"], row["error"]) for row in result["rows"]] == [(1, None), (2, None), (4, OUT_OF_MEMORY)]
    assert result["ended"] == OUT_OF_MEMORY
    assert result["rows"][-1] == {"batch": 4, "error": OUT_OF_MEMORY, "repeats": 0, **dict.fromkeys(STAGES)}


def test_a_real_memory_limit_gives_that_row_too(colour_archive: Path, tmp_path: Path) -> None:
    # 64 MiB a picture, written to.
    source = faking("np.ones(len(pixels) << 26, np.uint8)", "True")
    hungry = with_handler(colour_archive, tmp_path / "hungry.mar", source)
    result, _ = sweep.measure(plan(hungry, least=64, most=64, repeats=1, memory_mb=1200))
    errors = [row["error"] for row in result["rows"]]
    assert errors == [None] * (len(errors) - 1) + [OUT_OF_MEMORY]
    assert len(errors) > 1


# Inside the handler alone, which then answers each picture by itself: its time would be that of something else.
INSIDE = "len(pixels) > 2 and '_answer' in [one.name for one in __import__('traceback').extract_stack()]"


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        (faking("raise ZeroDivisionError('fake')"), {}, "fails on a batch of 4: ZeroDivisionError: fake"),
        (faking("raise ZeroDivisionError('fake')", INSIDE), {}, "fails on a batch of 4: ZeroDivisionError"),
        (
            faking(),
            {"pictures": few(RED, b"no picture")},
            r"a picture of the mix is refused \(the body starts with b'no",
        ),
        ("class Other:\n    def initialize(self, context): ...\n", {}, "cannot be timed: ValueError: Other is no Vis"),
        (None, {"device": "cuda:99"}, "BEELINE_DEVICE is 'cuda:99'"),
    ],
)
def test_what_cannot_be_timed_is_an_error_and_leaves_no_process(
    colour_archive: Path, tmp_path: Path, source: str | None, changes: dict[str, object], message: str
) -> None:
    archive = with_handler(colour_archive, tmp_path / "a.mar", source) if source else colour_archive
    with pytest.raises(ArchiveError, match=message):
        sweep.measure(plan(archive, **{"least": 64, "most": 64, **changes}))
    assert not children()


def test_a_changed_archive_is_refused(colour_archive: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copy(colour_archive, tmp_path))
    with zipfile.ZipFile(changed, "a") as archive:
        archive.writestr("numpy.py", "")
    with pytest.raises(ArchiveError, match=r"holds numpy\.py"):
        sweep.measure(plan(changed))


def test_a_worker_that_another_signal_ends_is_an_error(colour_archive: Path, tmp_path: Path) -> None:
    short = plan(with_handler(colour_archive, tmp_path / "fake.mar", faking()))
    with sweep.worker(short) as (sandbox, _):
        children()[0].send_signal(signal.SIGTERM)
        with pytest.raises(Undetermined, match="ended with signal SIGTERM"):
            sweep.measure_batch(sandbox, short, 1)


def test_the_mix_is_spread_over_the_folder_or_repeats_it(tmp_path: Path) -> None:
    many = few(*(bytes([i]) for i in range(100)))
    assert plan(tmp_path, pictures=many, mix=4).bodies() == [b"\x00", b"\x19", b"\x32", b"\x4b"]
    assert plan(tmp_path, pictures=few(b"a", b"b"), mix=5).bodies() == [b"a", b"b", b"a", b"b", b"a"]


def row(batch: int, per_image: float, handler: float | None = None) -> Row:
    """Return a row with these milliseconds for one image."""
    each = dict.fromkeys(STAGES, per_image) | ({"handler": handler} if handler else {})
    return {"batch": batch, "error": None, **{stage: {"ms_per_image": ms} for stage, ms in each.items()}}


def grown(a: float, b: float, least: int = 1, most: int = 1024, fits: int = 1 << 20) -> tuple[list[Row], str]:
    """Return the rows of milliseconds(n) = a * n + b and why they end; more than `fits` is out of memory."""
    rows: list[Row] = []
    while (ended := end(rows, least, most)) is None:
        batch = 1 << len(rows)
        rows.append(row(batch, a + b / batch) if batch <= fits else {"batch": batch, "error": OUT_OF_MEMORY})
    return rows, ended


def test_it_doubles_until_two_doublings_gained_next_to_nothing() -> None:
    rows, ended = grown(a=10, b=20)
    assert ended == "plateau"
    # 30, 20, 15, 12.5, 11.25, 10.63, 10.31, 10.16: the last two doublings gain 2.9 % and 1.5 %.
    assert [each["batch"] for each in rows] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert not is_flat(rows[:-1])
    assert is_flat([row(1, 10), row(2, 11), row(4, 12)])
    # The forward pass may still gain where the handler does not.
    assert not is_flat([row(1, 20, 30), row(2, 15, 30), row(4, 12, 30)])


def test_least_most_and_memory_end_a_sweep_too() -> None:
    rows, ended = grown(a=10, b=0, least=64)
    assert (rows[-1]["batch"], ended) == (64, "plateau")
    rows, ended = grown(a=1, b=100, most=6)
    assert ([each["batch"] for each in rows], ended) == ([1, 2, 4], "largest batch asked for (6)")
    rows, ended = grown(a=1, b=100, fits=4)
    assert ([each["error"] for each in rows], ended) == ([None, None, None, OUT_OF_MEMORY], OUT_OF_MEMORY)
    assert knee(rows) == 4


def test_the_knee_is_the_smallest_batch_near_the_cheapest_image() -> None:
    assert knee([row(1, 20), row(2, 12), row(4, 10.4), row(8, 10), row(16, 10.9)]) == 4
    assert knee([{"batch": 1, "error": OUT_OF_MEMORY}]) is None


def test_a_fit_has_the_line_and_its_largest_relative_error() -> None:
    line = fit([(n, 12.5 * n + 40) for n in (1, 2, 8, 64)])
    assert line is not None
    assert (line.a_ms, line.b_ms, line.error) == (pytest.approx(12.5), pytest.approx(40), pytest.approx(0, abs=1e-9))
    line = fit([(1, 10.0), (2, 20.0), (4, 60.0)])
    assert line is not None
    shares = [(line.a_ms * n + line.b_ms) / y - 1 for n, y in ((1, 10), (2, 20), (4, 60))]
    assert line.error == pytest.approx(max(map(abs, shares)))
    assert fit([(4, 10.0), (4, 11.0)]) is None


@pytest.mark.parametrize(("samples", "median", "low", "high"), [([4.0], 4, 4, 4), ([1.0, 2.0, 3.0, 4.0, 5.0], 3, 2, 4)])
def test_a_timing_is_median_and_quartiles(samples: list[float], median: float, low: float, high: float) -> None:
    expected = {"median_ms": median, "low_ms": low, "high_ms": high, "ms_per_image": median / 2}
    assert timing(2, samples) == expected
