"""The machine's description: complete, without its name, also where the system tells little."""

from __future__ import annotations

import json
import platform
from pathlib import Path

from bench import machine
from host.machine import cores


def test_it_is_complete_and_without_the_host_name() -> None:
    said = machine.describe()
    assert set(said) == {"cpu", "cores", "features", "memory_gb", "system", "python", "load_average", "gpus"}
    assert platform.node() not in json.dumps(said)
    assert said["python"] == platform.python_version()


def test_processor_and_features_are_the_first_processors(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    first = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512f amx_bf16 avx512_vnni2\n"
    cpuinfo.write_text(f"{first}\nprocessor\t: 1\nmodel name\t: Another\nflags\t\t: amx_int8\n")
    said = machine.describe(cpuinfo)
    assert said["cpu"] == "Some CPU @ 2 GHz"
    assert said["features"] == ["amx_bf16", "avx512f", "avx2"]


def test_without_that_file_the_architecture_is_named(tmp_path: Path) -> None:
    said = machine.describe(tmp_path / "none")
    assert said["cpu"]
    assert said["features"] == []


def test_a_summary_is_cores_architecture_and_system() -> None:
    assert machine.summary() == f"{cores()} cores, {platform.machine()}, {platform.system()}"


def test_versions_leave_out_what_is_not_installed() -> None:
    assert list(machine.versions("numpy", "no-such-package")) == ["numpy"]
