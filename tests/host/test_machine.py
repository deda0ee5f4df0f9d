"""Memory within a container's limits, and the GPUs; cores are in `tests/handlers/test_settings.py`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from host import machine


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 5000),
        ({"memory.max": "max\n", "memory.current": "800\n"}, 5000),
        ({"memory.max": "1000\n", "memory.current": "800\n"}, 200),
        ({"memory.max": "9000\n", "memory.current": "800\n"}, 5000),
        # The kernel drops files that it keeps in memory.
        (
            {"memory.max": "1000", "memory.current": "800", "memory.stat": "anon 9\ninactive_file 300\nactive_file 50"},
            550,
        ),
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


@pytest.mark.parametrize(
    ("files", "killed"),
    [({}, 0), ({"memory.events": "oom 9\noom_kill 3\n"}, 3), ({"memory/memory.oom_control": "oom_kill 2\n"}, 2)],
)
def test_the_kernels_count_of_processes_killed_for_memory(tmp_path: Path, files: dict[str, str], killed: int) -> None:
    assert machine.oom_kills(write(tmp_path, files)) == killed
