"""Records: what is written is read back; a line that is none is named."""

from __future__ import annotations

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import pytest

from beeline.errors import BeelineError
from bench import record
from bench.pictures import Pictures
from bench.record import Record


def made(**changes: Any) -> Record:
    pictures = Pictures("/somewhere/else/ants", ("1.jpg",), (b"picture",))
    return dataclasses.replace(Record.now("load", "beeline bench load", {"per_second": 3.5}, pictures), **changes)


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    one, two = made(), made(kind="tune", result={"sentence": "größer"})
    record.append(path, one)
    record.append(path, two)
    assert record.read(path) == [one, two]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2


def test_it_knows_machine_versions_and_pictures_and_no_path() -> None:
    one = made()
    assert one.machine["cores"] >= 1
    assert {"pycurl", "numpy"} <= set(one.versions)
    assert one.pictures["source"] == "ants"
    assert "/somewhere" not in json.dumps(dataclasses.asdict(one))
    assert one.started.endswith("+00:00")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is no JSON"),
        ('{"kind": "load"}', "is no record"),
        (json.dumps({**dataclasses.asdict(made()), "kind": "laod"}), "did you mean 'load'"),
        (json.dumps({**dataclasses.asdict(made()), "schema": 7}), "has schema 7"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "results.jsonl"
    record.append(path, made())
    with path.open("a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(BeelineError, match=rf"results\.jsonl:3 .*{message}"):
        record.read(path)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(BeelineError, match="is not there"):
        record.read(tmp_path / "none.jsonl")


def test_numbers_that_are_none_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        record.append(tmp_path / "results.jsonl", made(result={"p95_ms": float("nan")}))


def test_a_command_line_keeps_addresses_and_loses_folders_and_passwords() -> None:
    words = [
        "bench",
        "sweep",
        "/some/where/a.mar",
        "--url",
        "http://me:p@ss@127.0.0.1:8080/x",
        "--out=/a/b",
        "--fail-if",
        "p95>1s",
    ]
    said = "beeline bench sweep a.mar --url http://127.0.0.1:8080/x --out=b --fail-if 'p95>1s'"
    assert record.command_line("beeline", words) == said


def test_the_machine_is_complete_and_without_the_host_name(tmp_path: Path) -> None:
    machine = record.machine()
    assert set(machine) == {"cpu", "cores", "features", "memory_gb", "system", "python", "load_average", "gpus"}
    assert platform.node() not in json.dumps(machine)
    # Where the system has no such file, the architecture is named.
    without = record.machine(tmp_path / "none")
    assert without["cpu"]
    assert without["features"] == []


def test_processor_and_features_are_the_first_processors(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    first = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512f amx_bf16 avx512_vnni2\n"
    cpuinfo.write_text(f"{first}\nprocessor\t: 1\nmodel name\t: Another\nflags\t\t: amx_int8\n")
    machine = record.machine(cpuinfo)
    assert machine["cpu"] == "Some CPU @ 2 GHz"
    assert machine["features"] == ["amx_bf16", "avx512f", "avx2"]


def test_versions_leave_out_what_is_not_installed() -> None:
    assert list(record.versions("numpy", "no-such-package")) == ["numpy"]


def test_where_a_record_cannot_go_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    record.check_writable(None)
    record.check_writable(tmp_path / "new" / "out.jsonl")
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(BeelineError, match=r"^--out is \S+, which cannot be written \(Is a directory\); name another"):
        record.check_writable(tmp_path)
