"""What a worker reads of its environment: limits, the device, how many cores it may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from beeline import settings
from beeline.errors import ConfigError
from beeline.settings import MAX_BYTES, Limits, device_of


def test_limits_come_from_the_environment() -> None:
    assert Limits.from_environment({}) == Limits(MAX_BYTES, 50_000_000)
    assert Limits.from_environment({"BEELINE_MAX_BYTES": "10", "BEELINE_MAX_PIXELS": "20"}) == Limits(10, 20)
    for text in ("0", "-1", "20MB", "1.5", "²"):
        with pytest.raises(ConfigError, match="BEELINE_MAX_BYTES is"):
            Limits.from_environment({"BEELINE_MAX_BYTES": text})


@pytest.mark.parametrize(
    ("asked", "gpu_id", "devices", "found"),
    [
        ("auto", None, 0, "cpu, a fact"),
        ("auto", 1, 0, "cpu, a fact"),
        ("auto", None, 2, "cuda:0, a fact"),
        ("auto", 1, 2, "cuda:1, a fact"),
        ("auto", 1, None, "cuda:1, a fact"),
        ("cpu", 1, 2, "cpu, asked for"),
        ("cuda", 1, 2, "cuda:1, asked for"),
        ("cuda:1", 0, 2, "cuda:1, asked for"),
        ("cuda:9", 0, None, "cuda:9, asked for"),
        ("cuda", 0, 0, "BEELINE_DEVICE is 'cuda', and a fact: use auto or cpu, or a fix"),
        ("cuda:2", 0, 2, "BEELINE_DEVICE is 'cuda:2', and a fact: use auto or cpu, or a fix"),
    ],
)
def test_an_engine_runs_where_it_is_asked_to_or_says_why_not(
    asked: str, gpu_id: int | None, devices: int | None, found: str
) -> None:
    try:
        choice = device_of(asked, gpu_id, devices, "a fact", ", or a fix")
        assert f"{choice.value}, {choice.reason}" == found
    except ConfigError as error:
        assert str(error) == found


@pytest.mark.parametrize("asked", ["gpu", "cpu:0", "auto:1", "cuda:", "cuda:x", ""])
def test_a_device_that_does_not_exist_is_refused(asked: str) -> None:
    with pytest.raises(ConfigError, match="allowed: auto, cpu, cuda or cuda:<index>"):
        device_of(asked, None, 1, "")


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def v1(quota: str, period: str = "100000\n", folder: str = "cpu") -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": period}


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "200000 100000\n"}, 2),
        # Half a core counts as one.
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "50000 100000\n"}, 1),
        (v1("200000\n"), 2),
        (v1("25000\n", "50000\n"), 1),
        (v1("-1\n"), 8),
        ({"cpu/cpu.cfs_quota_us": "200000\n"}, 8),
        # A system may mount both versions.
        ({"cpu.max": "200000 100000\n", **v1("300000\n")}, 2),
    ],
)
@pytest.mark.usefixtures("eight_cores")
def test_a_quota_is_rounded_up_and_never_beyond_the_affinity(tmp_path: Path, files: dict[str, str], cores: int) -> None:
    assert settings.cores(write(tmp_path, files), tmp_path / "none") == cores


PARENTS = {"pod/cpu.max": "200000 100000\n", "pod/worker/cpu.max": "max 100000\n", "other/cpu.max": "100000 100000\n"}
PARENTS_V1 = {**v1("300000\n", folder="cpu/pod"), **v1("-1\n", folder="cpu/pod/worker")}
LISTED_V1 = "5:memory:/elsewhere\n4:cpu,cpuacct:/pod/worker\n1:name=systemd:/pod\n"


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("listed", "files", "cores"),
    [
        ("0::/pod/worker\n", PARENTS, 2),
        ("0::/pod/worker\n", {**PARENTS, "pod/worker/cpu.max": "100000 100000\n"}, 1),
        ("0::/pod/worker\n", {**PARENTS, "cpu.max": "150000 100000\n", "pod/cpu.max": "max 100000\n"}, 2),
        ("0::/\n", PARENTS, 8),
        (LISTED_V1, PARENTS_V1, 3),
        (LISTED_V1 + "0::/pod/worker\n", {**PARENTS, **PARENTS_V1}, 2),
        # The host's path, seen in a container that has only its own folder mounted.
        ("0::/docker/1f2e\n", {"cpu.max": "400000 100000\n"}, 4),
        ("4:cpu,cpuacct:/docker/1f2e\n", v1("400000\n"), 4),
    ],
)
def test_the_tightest_quota_of_all_parents_counts(
    tmp_path: Path, listed: str, files: dict[str, str], cores: int
) -> None:
    (tmp_path / "membership").write_text(listed)
    assert settings.cores(write(tmp_path, files), tmp_path / "membership") == cores
