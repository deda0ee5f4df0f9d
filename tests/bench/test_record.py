"""Records and journals: what is written is read back; a line that is none is named; a job goes on where it stopped."""

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
from bench.record import Journal, Record, interval

ABOUT = {"model": "colours", "goal": {"p95_ms": 500.0}}


def made(**changes: Any) -> Record:
    pictures = Pictures("/somewhere/else/ants", ("1.jpg",), (b"picture",))
    return dataclasses.replace(Record.now("load", "beeline bench load", {"per_second": 3.5}, pictures), **changes)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    begun = Journal.job(tmp_path / "folder" / "a.journal", ABOUT)
    begun.add("batch", [2, 8, 41.5])
    begun.add("turn", {"per_second": 3.5, "p95_ms": None})
    return begun


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    record.check_writable(path)
    one, two = made(), made(kind="tune", result={"sentence": "größer"})
    record.append(path, one)
    record.append(path, two)
    assert record.read(path) == [one, two]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2


def test_a_record_has_machine_versions_and_pictures_and_no_path() -> None:
    one = made()
    assert {"pycurl", "numpy"} <= set(one.versions)
    assert one.pictures["source"] == "ants"
    assert "/somewhere" not in json.dumps(dataclasses.asdict(one))
    assert one.started.endswith("+00:00")
    assert set(one.machine) == {*("cpu", "cores", "features", "memory_gb", "system", "python", "load_average", "gpus")}
    assert platform.node() not in json.dumps(one.machine)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", "must be a mapping"),
        ('{"kind": "load"}', "missing 6 required"),
        (json.dumps({**dataclasses.asdict(made()), "kind": "laod"}), "kind is 'laod'.*known are load, sweep"),
        (json.dumps({**dataclasses.asdict(made()), "schema": 7}), "schema 7"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "results.jsonl"
    record.append(path, made())
    with path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(BeelineError, match=rf"results\.jsonl:2 is no record \(?.*{message}"):
        record.read(path)


def test_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        record.append(tmp_path / "results.jsonl", made(result={"p95_ms": float("nan")}))


def test_a_command_line_keeps_addresses_and_loses_folders_and_passwords() -> None:
    words = ["/some/where/a.mar", "--url", "http://me:p@ss@127.0.0.1:8080/x", "--out=/a/b", "--fail-if", "p95>1s"]
    said = "beeline a.mar --url http://127.0.0.1:8080/x --out=b --fail-if 'p95>1s'"
    assert record.command_line("beeline", words) == said


def test_processor_and_features_are_the_first_processors_else_the_architecture_is_named(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    first = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512f amx_bf16 avx512_vnni2\n"
    cpuinfo.write_text(f"{first}\nprocessor\t: 1\nmodel name\t: Another\nflags\t\t: amx_int8\n")
    machine = record.machine(cpuinfo)
    assert machine["cpu"] == "Some CPU @ 2 GHz"
    assert machine["features"] == ["amx_bf16", "avx512f", "avx2"]
    without = record.machine(tmp_path / "none")
    assert without["cpu"]
    assert without["features"] == []


def test_a_file_that_cannot_be_written_is_an_error_before_the_measurement(tmp_path: Path) -> None:
    record.check_writable(None)
    with pytest.raises(BeelineError, match=r"^--out is \S+, which cannot be written \(Is a directory\); name another"):
        record.check_writable(tmp_path)


@pytest.mark.parametrize(("count", "cut"), [(6, 0), (8, 0), (9, 1), (12, 2), (20, 5)])
def test_an_interval_is_by_rank(count: int, cut: int) -> None:
    assert interval(range(count)) == [cut, count - 1 - cut]
    assert interval([1.0] * 5) is interval([]) is None


def test_a_journal_is_read_again(journal: Journal) -> None:
    again = Journal.job(journal.path, ABOUT)
    assert again == journal
    assert again.of("batch") == [[2, 8, 41.5]]
    assert again.of("none") == []


def test_a_last_line_that_broke_off_is_dropped(journal: Journal) -> None:
    journal.path.write_text(journal.path.read_text()[:-20])
    again = Journal.job(journal.path, ABOUT)
    assert again.of("turn") == []
    again.add("turn", 7)
    assert Journal.job(journal.path, ABOUT).of("turn") == [7]


def test_what_a_job_has_is_not_measured_again(journal: Journal) -> None:
    job = Journal.job(journal.path, ABOUT)
    assert job.once("batch", lambda: pytest.fail("it is there")) == [2, 8, 41.5]
    assert job.once("other", lambda: 1) == 1
    assert Journal.job(journal.path, ABOUT).of("other") == [1]


@pytest.mark.parametrize(
    "text", ["", "\n", "no JSON\n", '{"kind": "load"}\n', '{"about": {"model": "other"}}\n["a", 1]\n']
)
def test_a_journal_about_something_else_starts_again(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.journal"
    path.write_text(text)
    assert Journal.job(path, ABOUT).rows == []
    assert path.read_text() == json.dumps({"about": ABOUT}) + "\n"
