"""Option over environment over file over default, each number with its reason."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archive.mar import Archive
from beeline.errors import ConfigError
from serve.config import Configuration, Overrides, Setting, resolve
from serve.properties import Entry, Properties, load


def archive(model: str = "fake", version: str = "1.0") -> Archive:
    return Archive(Path(f"/store/{model}.mar"), model, version)


def resolved(
    numbers: dict[str, int] | None = None,
    overrides: Overrides | None = None,
    environ: dict[str, str] | None = None,
    cores: int = 8,
    gpus: int = 0,
    memory: int = 64 * 10**9,
    archives: tuple[Archive, ...] = (archive(),),
    properties: Properties | None = None,
) -> Configuration:
    models = {} if numbers is None else {"fake": {"1.0": Entry.model_validate(numbers)}}
    given_properties = properties or Properties(Path("config.properties"), models=models)
    return resolve(given_properties, archives, overrides or Overrides(), environ or {}, cores, gpus, memory)


def test_option_over_environment_over_file_over_default() -> None:
    file, environ = {"batchSize": 4}, {"BATCH_SIZE": "16"}
    assert resolved().models[0].batch_size.value == 8
    assert resolved(file).models[0].batch_size == Setting(4, "config.properties")
    assert resolved(file, environ=environ).models[0].batch_size == Setting(16, "environment BATCH_SIZE")
    option = resolved(file, Overrides(batch_size=32), environ).models[0].batch_size
    assert option == Setting(32, "--batch-size")
    model = resolved({"minWorkers": 1, "maxWorkers": 4}, environ={"WORKERS": "3", "LINGER_MS": "25"}).models[0]
    assert (model.min_workers.value, model.max_workers.value, model.max_batch_delay.value) == (3, 3, 25)


def test_a_model_without_an_entry_says_so_and_a_lone_entry_serves_any_version() -> None:
    assert resolved().models[0].batch_size.reason == "default: config.properties has no entry for fake 1.0"
    newer = resolved({"batchSize": 4}, archives=(archive(version="2.0"),)).models[0]
    assert newer.batch_size == Setting(4, "config.properties, its entry for fake 1.0")


@given(cores=st.integers(1, 256), workers=st.integers(1, 256))
def test_threads_never_exceed_the_cores(cores: int, workers: int) -> None:
    threads = resolved(overrides=Overrides(workers=workers), cores=cores).threads.value
    assert threads == 1 or threads * workers <= cores
    assert threads >= 1


def test_threads_are_a_workers_share_of_the_cores_unless_they_are_given(tmp_path: Path) -> None:
    both = resolved(overrides=Overrides(workers=2), archives=(archive(), archive("other")), cores=8)
    assert both.threads == Setting(2, "8 cores / 4 workers")
    file = tmp_path / "config.properties"
    file.write_text("beeline_threads=3\n")
    assert resolved(properties=load(file)).threads == Setting(3, "config.properties")
    said = resolved(properties=load(file, {"BEELINE_THREADS": "5"}))
    assert said.threads == Setting(5, "environment BEELINE_THREADS")
    assert any(line.startswith("threads a worker 5 (environment BEELINE_THREADS); ") for line in said.lines())


@pytest.mark.parametrize(("cores", "lone"), [(2, 2), (3, 3), (64, 4)])
def test_a_lone_picture_gets_the_cores_up_to_four(cores: int, lone: int) -> None:
    configuration = resolved(overrides=Overrides(workers=cores), cores=cores)
    assert configuration.numbers["beeline_lone_threads"] == Setting(lone, f"{cores} cores, at most 4")
    assert any(f"OpenVINO's for a lone picture {lone} ({cores} cores" in line for line in configuration.lines())


def test_a_lone_picture_gets_as_many_threads_as_a_batch_or_more_unless_all_come_alone() -> None:
    workers = Overrides(workers=2)
    assert resolved(overrides=workers, cores=16).numbers["beeline_lone_threads"] == Setting(8, "as many as a worker's")
    alone = resolved(overrides=Overrides(workers=2, batch_size=1), cores=2).numbers["beeline_lone_threads"]
    assert alone == Setting(1, "as many as a worker's, since batches are of one")
    file = Properties(Path("config.properties"), numbers={"beeline_lone_threads": 1})
    assert resolved(properties=file, cores=8).numbers["beeline_lone_threads"] == Setting(1, "config.properties")


@pytest.mark.parametrize(("cores", "gpus", "workers"), [(1, 0, 1), (2, 0, 1), (6, 0, 3), (64, 0, 4), (64, 2, 2)])
def test_default_workers_come_from_the_machine(cores: int, gpus: int, workers: int) -> None:
    assert resolved(cores=cores, gpus=gpus).models[0].min_workers.value == workers


@pytest.mark.parametrize(
    ("overrides", "environ", "said"),
    [
        (Overrides(batch_size=0), {}, "--batch-size is 0; allowed: a whole number of requests, 1 to 1024"),
        (Overrides(), {"BATCH_SIZE": "x"}, "BATCH_SIZE is 'x'; allowed"),
        (Overrides(), {"WORKERS": "0"}, "WORKERS is '0'; allowed"),
        (Overrides(), {"LINGER_MS": "1.5"}, "LINGER_MS is '1.5'; allowed"),
    ],
)
def test_an_impossible_number_is_one_sentence(overrides: Overrides, environ: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(overrides=overrides, environ=environ)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("engine", "gigabytes", "workers", "reason"),
    [
        ("openvino", 64, 4, "half of 16 cores, at most 4"),
        # (2,000 - 400) / (150 + 2 * 45) would be six.
        ("openvino", 2, 4, "half of 16 cores, at most 4"),
        ("torch", 2, 2, "one of each model takes about 790 MB, and 2,000 MB are free"),
        ("", 2, 2, "one of each model takes about 790 MB, and 2,000 MB are free"),
        ("openvino", 1, 2, "one of each model takes about 240 MB, and 1,000 MB are free"),
        ("torch", 0, 1, "one of each model takes about 790 MB, and 0 MB are free"),
    ],
)
def test_workers_follow_memory_as_well_as_cores(engine: str, gigabytes: int, workers: int, reason: str) -> None:
    archives = (dataclasses.replace(archive(), engine=engine, unpacked=45_000_000),)
    chosen = resolved(archives=archives, cores=16, memory=gigabytes * 10**9)
    assert chosen.models[0].min_workers == Setting(workers, reason)
    assert bool(chosen.warning) is (gigabytes == 0)


def test_what_is_configured_and_cannot_fit_is_said() -> None:
    many = tuple(dataclasses.replace(archive(f"model{number}"), engine="openvino") for number in range(30))
    assert resolved(archives=many, memory=8 * 10**9).warning == ""
    asked = resolved(overrides=Overrides(workers=2), archives=many, memory=8 * 10**9)
    assert "60 workers and the server take about 10,000 MB, and 8,000 MB of memory are free" in asked.lines()[-1]
    assert {model.min_workers.reason for model in asked.models} == {"--workers"}


def test_each_number_has_its_reason_and_limits_follow_from_others(tmp_path: Path) -> None:
    file = tmp_path / "config.properties"
    file.write_text("beeline_drain_seconds=5\nbeeline_stop_seconds=6\nbeeline_log_files=7\n")
    found = resolved(properties=load(file, {"BEELINE_DRAIN_SECONDS": "3", "BEELINE_JOB_QUEUE_SIZE": "40"}))
    assert found.numbers["beeline_drain_seconds"] == Setting(3, "environment BEELINE_DRAIN_SECONDS")
    assert found.numbers["beeline_stop_seconds"] == Setting(6, "config.properties")
    assert found.numbers["beeline_requests_per_second"] == Setting(400, "10 times job_queue_size")
    assert found.numbers["beeline_max_image_bytes"] == Setting(20_000_000, "default")
    # Processes get the time to drain and to stop, and a little more.
    assert found.stop_grace > 3 + 6
    # The largest picture fits as base64 in JSON.
    assert found.max_request_size >= 20_000_000 * 4 / 3 + 4096
    given_rate = Properties(file, numbers={"beeline_requests_per_second": 7})
    assert resolved(properties=given_rate).numbers["beeline_requests_per_second"].value == 7
    assert json.loads(json.dumps(found.to_dict()))["models"][0]["batch_size"]["reason"]


@pytest.mark.parametrize(
    ("deadline", "asked", "seconds", "reason"),
    [
        (60, None, 30, "half of beeline_deadline_seconds"),
        (1, None, 1, "half of beeline_deadline_seconds"),
        (60, 45, 45, "config.properties"),
        (60, 120, 60, "beeline_deadline_seconds, since config.properties has a longer one"),
    ],
)
def test_a_worker_may_be_silent_for_half_of_the_deadline_and_never_longer_than_it(
    deadline: int, asked: int | None, seconds: int, reason: str
) -> None:
    models = {} if asked is None else {"fake": {"1.0": Entry.model_validate({"responseTimeout": asked})}}
    read = Properties(Path("config.properties"), {"beeline_deadline_seconds": deadline}, models=models)
    assert resolved(properties=read).models[0].response_timeout == Setting(seconds, reason)


QUEUE = "a full queue of small bodies"


@pytest.mark.parametrize(
    ("numbers", "vmargs", "gigabytes", "heap"),
    [
        ({}, "", 64, Setting(1024, "an eighth of the free memory, at most 1024")),
        ({}, "", 4, Setting(477, "an eighth of the free memory, at most 1024")),
        ({}, "", 1, Setting(340, "two of the largest bodies")),
        ({"job_queue_size": 100_000}, "", 8, Setting(1908, f"{QUEUE}, at most a quarter of the free memory")),
        ({"beeline_heap_megabytes": 256}, "", 64, Setting(256, "config.properties")),
        ({"beeline_heap_megabytes": 256}, "-ea -Xmx2g", 64, Setting(2048, "-Xmx in Java's options")),
    ],
)
def test_the_heap_has_a_reason_and_bodies_of_all_sizes_fill_at_most_three_quarters_of_it(
    numbers: dict[str, int], vmargs: str, gigabytes: int, heap: Setting
) -> None:
    read = Properties(Path("config.properties"), numbers, texts={"vmargs": vmargs} if vmargs else {})
    made = resolved(properties=read, memory=gigabytes * 10**9)
    assert made.numbers["beeline_heap_megabytes"] == heap
    held = sum(count * (size or made.max_request_size) for size, count in made.places.items())
    assert held <= 0.75 * heap.value * 2**20
    assert f"{made.places[0]} larger ones" in made.lines()[2]


def test_of_the_heaps_that_java_reads_the_last_one_counts() -> None:
    read = Properties(Path("config.properties"), texts={"vmargs": "-Xmx2g"})
    for name, heap in (("JAVA_TOOL_OPTIONS", 2048), ("JDK_JAVA_OPTIONS", 2048), ("_JAVA_OPTIONS", 4096)):
        made = resolved(properties=read, environ={name: "-Xmx4g"})
        assert made.numbers["beeline_heap_megabytes"].value == heap


def test_a_heap_that_cannot_hold_two_of_the_largest_bodies_is_refused() -> None:
    read = Properties(Path("config.properties"), {"beeline_heap_megabytes": 128, "beeline_max_image_bytes": 10**8})
    with pytest.raises(
        ConfigError, match=r"heap is 128 MB \(config.properties\), and two of the largest bodies take 255;"
    ):
        resolved(properties=read)
