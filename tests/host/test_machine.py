"""The GPUs of this machine; its cores are in `tests/handlers/test_settings.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from host import machine


def test_gpus_are_what_the_command_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.gpus() == 0
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: GPU-1)'\necho 'GPU 1: B (UUID: GPU-2)'\necho '  MIG 1g'\n")
    command.chmod(0o755)
    assert machine.gpus() == 2
    command.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert machine.gpus() == 0
