"""What this process may use: the affinity, and a container's limits in either version of cgroups; the GPUs."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from host import machine


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def v1(quota: str, period: str = "100000\n") -> dict[str, str]:
    return {"cpu/cpu.cfs_quota_us": quota, "cpu/cpu.cfs_period_us": period}


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "200000 100000\n"}, 2),
        # Half a core more than two is used by a third.
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "6400000 100000\n"}, 8),
        ({"cpu.max": ""}, 8),
        ({"cpu.max": "many cores\n"}, 8),
        (v1("200000\n"), 2),
        (v1("25000\n", "50000\n"), 1),
        (v1("-1\n"), 8),
        (v1("200000\n", ""), 8),
        ({"cpu/cpu.cfs_quota_us": "200000\n"}, 8),
        # Both are mounted where a system is on its way from one to the other.
        ({"cpu.max": "max 100000\n", **v1("300000\n")}, 3),
        ({"cpu.max": "200000 100000\n", **v1("300000\n")}, 2),
    ],
)
def test_a_quota_is_rounded_up_and_never_beyond_the_affinity(tmp_path: Path, files: dict[str, str], cores: int) -> None:
    assert machine.cores(write(tmp_path, files)) == cores


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 5000),
        ({"memory.max": "max\n", "memory.current": "800\n"}, 5000),
        ({"memory.max": "1000\n", "memory.current": "800\n"}, 200),
        ({"memory.max": "9000\n", "memory.current": "800\n"}, 5000),
        # A limit that was lowered below what is used.
        ({"memory.max": "1000\n", "memory.current": "1200\n"}, 0),
        ({"memory.max": "1000\n"}, 5000),
        ({"memory/memory.limit_in_bytes": "1000\n", "memory/memory.usage_in_bytes": "300\n"}, 700),
    ],
)
def test_free_memory_is_never_beyond_a_containers_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], free: int
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5000, total=8000))
    assert machine.free_memory(write(tmp_path, files)) == free
    assert machine.memory() == 8000


def test_gpus_are_what_the_command_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.gpus() == []
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'GPU 0: A (2nd) (UUID: GPU-1)'\necho 'GPU 1: B'\necho '  MIG 1g'\n")
    command.chmod(0o755)
    assert machine.gpus() == ["A (2nd)", "B"]
    command.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert machine.gpus() == []
