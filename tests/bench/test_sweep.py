"""Batch sweeps: where they end and what they say, and real archives in their sandbox that leave nothing."""

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
from bench import sweep
from bench.sweep import (
    OUT_OF_MEMORY,
    REFERENCES,
    STAGES,
    Plan,
    Row,
    TimedSandbox,
    Timing,
    differences,
    fit,
    grow,
    is_flat,
    knee,
)
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
    result, interruption = sweep.measure(plan(colour_archive, least=4), seen.append)
    assert interruption is None
    assert [row.batch for row in seen] == [1, 2, 4]
    assert result["rows"] == [row.to_dict() for row in seen]
    for row in seen:
        assert (row.error, row.repeats) == (None, 2)
        for stage in STAGES:
            timing = row.stages[stage]
            assert 0 < timing.low_ms <= timing.median_ms <= timing.high_ms
            assert timing.ms_per_image == pytest.approx(timing.median_ms / row.batch, rel=0.01)
    assert not children()
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["model"], result["version"], result["classes"]) == ("colours", "1.0", 3)
    assert (result["device"], result["precision"], result["threads"]) == ("cpu", "fp32", 1)
    assert result["knee"] in (1, 2, 4)
    assert result["not_run"] == [{"what": "CUDA", "why": "cpu was asked for"}]
    assert set(result["fit"]) == {"forward", "handler"}
    text = sweep.text(result)
    assert "<- knee" in text
    assert "whole handler" in text
    assert "17.5 at batch 8, 13.75 at batch 32, worse at 64" in text
    assert "CUDA: not run, cpu was asked for" in text


@pytest.mark.parametrize("failure", ["raise torch.OutOfMemoryError()", "raise MemoryError", "os.kill(os.getpid(), 9)"])
def test_out_of_memory_is_a_row_however_it_is_said(colour_archive: Path, tmp_path: Path, failure: str) -> None:
    result, _ = sweep.measure(
        plan(with_handler(colour_archive, tmp_path / "a.mar", faking(failure)), least=64, most=64)
    )
    assert [(row["batch"], row["error"]) for row in result["rows"]] == [(1, None), (2, None), (4, OUT_OF_MEMORY)]
    assert result["ended"] == OUT_OF_MEMORY
    assert result["rows"][-1] == {"batch": 4, "error": OUT_OF_MEMORY, "repeats": 0, **dict.fromkeys(STAGES)}
    assert "out of memory" in sweep.text(result)


def test_a_real_memory_limit_gives_that_row_too(colour_archive: Path, tmp_path: Path) -> None:
    # 64 MiB a picture, written to.
    source = faking("np.ones(len(pixels) << 26, np.uint8)", "True")
    hungry = with_handler(colour_archive, tmp_path / "hungry.mar", source)
    result, _ = sweep.measure(plan(hungry, least=64, most=64, repeats=1, memory_mb=1200))
    errors = [row["error"] for row in result["rows"]]
    assert errors == [None] * (len(errors) - 1) + [OUT_OF_MEMORY]
    assert len(errors) > 1


def test_another_failure_is_an_error_with_its_batch_size(colour_archive: Path, tmp_path: Path) -> None:
    wrong = faking("raise ZeroDivisionError('fake')")
    with pytest.raises(ArchiveError, match="fails on a batch of 4: ZeroDivisionError: fake"):
        sweep.measure(plan(with_handler(colour_archive, tmp_path / "wrong.mar", wrong), least=64, most=64))
    assert not children()


def test_a_failure_inside_the_handler_alone_is_not_timed(colour_archive: Path, tmp_path: Path) -> None:
    """The handler answers each picture alone after it, which would be the time of another thing."""
    inside = "len(pixels) > 2 and '_answer' in [one.name for one in traceback.extract_stack()]"
    source = "import traceback" + faking("raise ZeroDivisionError('fake')", inside)
    with pytest.raises(ArchiveError, match="fails on a batch of 4: ZeroDivisionError"):
        sweep.measure(plan(with_handler(colour_archive, tmp_path / "inside.mar", source), least=64, most=64))


def test_a_picture_that_is_refused_is_named_before_anything_is_timed(colour_archive: Path, tmp_path: Path) -> None:
    fake = with_handler(colour_archive, tmp_path / "fake.mar", faking())
    with pytest.raises(ArchiveError, match=r"a picture of the mix is refused \(the body starts with b'no picture"):
        sweep.measure(plan(fake, pictures=Few((RED, b"no picture at all"))))


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
        sweep.measure(plan(with_handler(colour_archive, tmp_path / "other.mar", source)))
    assert not children()


def test_a_device_that_is_not_there_is_refused(colour_archive: Path) -> None:
    with pytest.raises(ArchiveError, match="BEELINE_DEVICE is 'cuda:99'"):
        sweep.measure(plan(colour_archive, device="cuda:99"))


def test_a_changed_archive_is_refused(colour_archive: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.mar"
    changed.write_bytes(colour_archive.read_bytes())
    with zipfile.ZipFile(changed, "a") as archive:
        archive.writestr("numpy.py", "")
    with pytest.raises(ArchiveError, match=r"holds numpy\.py"):
        sweep.measure(plan(changed))


def test_no_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"is no \.mar file"):
        sweep.measure(plan(tmp_path))


def test_a_worker_that_ends_otherwise_is_no_row(colour_archive: Path, tmp_path: Path) -> None:
    with TimedSandbox(plan(with_handler(colour_archive, tmp_path / "fake.mar", faking()))) as worker:
        assert worker._process is not None
        worker._process.send_signal(signal.SIGTERM)
        with pytest.raises(Undetermined, match="ended with signal SIGTERM"):
            worker.measure(1)


def test_a_worker_that_hangs_is_given_up(colour_archive: Path, tmp_path: Path) -> None:
    hanging = with_handler(colour_archive, tmp_path / "hanging.mar", faking("time.sleep(3600)"))
    with TimedSandbox(plan(hanging)) as worker:
        worker._seconds = (300.0, 0.5)
        with pytest.raises(Undetermined, match=r"no reply within 0\.5 s"):
            worker.measure(4)
    assert not children()


def test_leaving_early_ends_the_worker_and_removes_what_it_unpacked(
    colour_archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A temporary folder of its own: other tests make sandboxes at the same time.
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    sandboxes: list[Path] = []
    fake = with_handler(colour_archive, tmp_path / "fake.mar", faking())

    def stop(row: Row) -> None:
        sandboxes.extend(temporary.iterdir())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.measure(plan(fake), stop)
    assert not children()
    assert sandboxes
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"most": 0}, "most is 0"),
        ({"repeats": 0}, "repeats is 0"),
        ({"least": 8, "most": 4}, "least is 8 and most 4"),
        ({"memory_mb": 0}, "memory_mb is 0"),
    ],
)
def test_impossible_numbers_are_refused(tmp_path: Path, changes: dict[str, int], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        plan(tmp_path, **changes)


def test_the_mix_is_spread_over_the_folder_or_repeats_it(tmp_path: Path) -> None:
    many = Few(tuple(bytes([i]) for i in range(100)))
    assert plan(tmp_path, pictures=many, mix=4).bodies() == [b"\x00", b"\x19", b"\x32", b"\x4b"]
    assert plan(tmp_path, pictures=Few((b"a", b"b")), mix=5).bodies() == [b"a", b"b", b"a", b"b", b"a"]


def row(batch: int, per_image: float, handler: float | None = None) -> Row:
    """Return a row with these milliseconds for one image."""
    each = dict.fromkeys(STAGES, per_image) | {"handler": per_image if handler is None else handler}
    return Row(batch, {stage: Timing(ms * batch, ms * batch, ms * batch, ms) for stage, ms in each.items()}, 7)


def grown(a: float, b: float, least: int = 1, most: int = 1024, fits: int = 1 << 20) -> tuple[list[Row], str]:
    """Return the rows of milliseconds(n) = a * n + b and why they end; more than `fits` is out of memory."""
    rows: list[Row] = []
    made = lambda batch: row(batch, a + b / batch) if batch <= fits else Row(batch, {}, error=OUT_OF_MEMORY)  # noqa: E731
    return rows, grow(made, least, most, rows.append)


def test_it_doubles_until_two_doublings_gained_next_to_nothing() -> None:
    rows, ended = grown(a=10, b=20)
    assert ended == "plateau"
    # 30, 20, 15, 12.5, 11.25, 10.63, 10.31, 10.16: the last two doublings gain 2.9 % and 1.5 %.
    assert [each.batch for each in rows] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert not is_flat(rows[:-1])
    assert is_flat([row(1, 10), row(2, 11), row(4, 12)])
    # The forward pass may still gain where the handler does not.
    assert not is_flat([row(1, 20, 30), row(2, 15, 30), row(4, 12, 30)])


def test_least_most_and_memory_end_it_otherwise() -> None:
    rows, ended = grown(a=10, b=0, least=64)
    assert (rows[-1].batch, ended) == (64, "plateau")
    rows, ended = grown(a=1, b=100, most=6)
    assert ([each.batch for each in rows], ended) == ([1, 2, 4], "largest batch asked for (6)")
    rows, ended = grown(a=1, b=100, fits=4)
    assert ([each.error for each in rows], ended) == ([None, None, None, OUT_OF_MEMORY], OUT_OF_MEMORY)
    assert knee(rows) == 4


def test_the_knee_is_the_smallest_batch_near_the_cheapest_image() -> None:
    assert knee([row(1, 20), row(2, 12), row(4, 10.4), row(8, 10), row(16, 10.9)]) == 4
    assert knee([Row(1, {}, error=OUT_OF_MEMORY)]) is None


@pytest.mark.parametrize(("samples", "median", "low", "high"), [([4.0], 4, 4, 4), ([1.0, 2.0, 3.0, 4.0, 5.0], 3, 2, 4)])
def test_a_timing_is_median_and_quartiles(samples: list[float], median: float, low: float, high: float) -> None:
    assert Timing.of(samples, 2) == Timing(median, low, high, median / 2)


def test_a_line_is_found_again_with_its_largest_relative_error() -> None:
    line = fit([(n, 12.5 * n + 40) for n in (1, 2, 8, 64)])
    assert line is not None
    assert (line.a_ms, line.b_ms, line.error) == (pytest.approx(12.5), pytest.approx(40), pytest.approx(0, abs=1e-9))
    line = fit([(1, 10.0), (2, 20.0), (4, 60.0)])
    assert line is not None
    shares = [(line.a_ms * n + line.b_ms) / y - 1 for n, y in ((1, 10), (2, 20), (4, 60))]
    assert line.error == pytest.approx(max(map(abs, shares)))
    assert fit([(4, 10.0), (4, 11.0)]) is None


def test_the_shape_is_compared_with_what_users_reported() -> None:
    assert [one["points"] for one in REFERENCES] == [[[8, 17.5], [32, 13.75]], [[1, 2.75], [256, 1.02]]]
    resnet18, resnet101, rest = differences(grown(a=20, b=2, least=64, most=64)[0])
    assert "an image gets 1.27 times faster from batch 8 to 32 and is worse at 64" in resnet18
    assert "A batch of theirs costs 40 ms fixed and 12.5 ms an image, one of ours 2 ms fixed and 20 ms" in resnet18
    assert "only what is fixed is spread over more images, which makes ours no faster." in resnet18
    # Ours ends at 64, which is nearest to their 256.
    assert "our forward pass gets 1.10 times faster from 1 to 64" in resnet101
    assert "0 ms (0%) are outside the forward pass" in rest
    alike = {"what": "X", "points": [[8, 17.5], [32, 13.75]], "worse_at": None}
    assert differences(grown(a=12.5, b=40)[0], [alike])[0].endswith("the shapes are alike.")


def test_few_batch_sizes_are_not_compared() -> None:
    assert "only batch 4 in that range" in differences(grown(a=1, b=1, most=4)[0])[0]
    assert differences([row(1, 10), Row(2, {}, error=OUT_OF_MEMORY)]) == [
        "Ours has fewer than two batch sizes, so there is no shape to compare."
    ]
