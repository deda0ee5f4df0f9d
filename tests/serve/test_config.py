"""Flag over environment over file over default, each number with its reason."""

from __future__ import annotations

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
    archives: tuple[Archive, ...] = (archive(),),
    properties: Properties | None = None,
) -> Configuration:
    models = {} if numbers is None else {"fake": {"1.0": Entry.model_validate(numbers)}}
    given_properties = properties or Properties(Path("config.properties"), models=models)
    return resolve(given_properties, archives, overrides or Overrides(), environ or {}, cores, gpus)


def test_flag_over_environment_over_file_over_default() -> None:
    file, environ = {"batchSize": 4}, {"BATCH_SIZE": "16"}
    assert resolved().models[0].batch_size.value == 8
    assert resolved(file).models[0].batch_size == Setting(4, "config.properties")
    assert resolved(file, environ=environ).models[0].batch_size == Setting(16, "environment BATCH_SIZE")
    flag = resolved(file, Overrides(batch_size=32), environ).models[0].batch_size
    assert flag == Setting(32, "--batch-size")


def test_workers_and_delay_have_their_variables_too() -> None:
    model = resolved({"minWorkers": 1, "maxWorkers": 4}, environ={"WORKERS": "3", "LINGER_MS": "25"}).models[0]
    assert (model.min_workers.value, model.max_workers.value, model.max_batch_delay.value) == (3, 3, 25)


def test_a_model_without_an_entry_says_so() -> None:
    reason = resolved().models[0].batch_size.reason
    assert reason == "default: config.properties has no entry for fake 1.0"


def test_a_lone_entry_fits_another_version_and_says_so() -> None:
    newer = resolved({"batchSize": 4}, archives=(archive(version="2.0"),)).models[0]
    assert newer.batch_size == Setting(4, "config.properties, its entry for fake 1.0")


@given(cores=st.integers(1, 256), workers=st.integers(1, 256))
def test_threads_never_exceed_the_cores(cores: int, workers: int) -> None:
    threads = resolved(overrides=Overrides(workers=workers), cores=cores).threads.value
    assert threads == 1 or threads * workers <= cores
    assert threads >= 1


def test_threads_are_shared_by_the_workers_of_all_models() -> None:
    both = resolved(overrides=Overrides(workers=2), archives=(archive(), archive("other")), cores=8)
    assert both.threads == Setting(2, "8 cores / 4 workers")


def test_threads_that_are_given_win_over_the_share_of_the_cores(tmp_path: Path) -> None:
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


def test_a_lone_picture_never_gets_fewer_threads_than_a_batch_nor_more_where_all_come_alone() -> None:
    workers = Overrides(workers=2)
    assert resolved(overrides=workers, cores=16).numbers["beeline_lone_threads"] == Setting(8, "as many as a worker's")
    alone = resolved(overrides=Overrides(workers=2, batch_size=1), cores=2).numbers["beeline_lone_threads"]
    assert alone == Setting(1, "as many as a worker's, since batches are of one")


def test_a_lone_pictures_threads_may_be_given() -> None:
    said = Properties(Path("config.properties"), numbers={"beeline_lone_threads": 1})
    assert resolved(properties=said, cores=8).numbers["beeline_lone_threads"] == Setting(1, "config.properties")


@pytest.mark.parametrize("value", ["0", "many", "257"])
def test_impossible_threads_are_one_sentence(tmp_path: Path, value: str) -> None:
    file = tmp_path / "config.properties"
    file.write_text(f"beeline_threads={value}\n")
    with pytest.raises(
        ConfigError, match=f"beeline_threads is '{value}'; allowed: a whole number of threads, 1 to 256"
    ):
        load(file)


@pytest.mark.parametrize(("cores", "gpus", "workers"), [(1, 0, 1), (2, 0, 1), (6, 0, 3), (64, 0, 4), (64, 2, 2)])
def test_default_workers_come_from_the_machine(cores: int, gpus: int, workers: int) -> None:
    assert resolved(cores=cores, gpus=gpus).models[0].min_workers.value == workers


def test_one_limit_makes_the_servers_limit_with_room_for_base64() -> None:
    configuration = resolved()
    picture = configuration.numbers["beeline_max_image_bytes"].value
    assert configuration.max_request_size >= picture * 4 / 3 + 4096


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


def test_the_rate_of_one_client_comes_from_the_queue() -> None:
    numbers = resolved().numbers
    assert numbers["beeline_requests_per_second"] == Setting(
        10 * numbers["job_queue_size"].value, "10 times job_queue_size"
    )
    said = Properties(Path("config.properties"), numbers={"beeline_requests_per_second": 7})
    assert resolved(properties=said).numbers["beeline_requests_per_second"].value == 7


def test_the_resolved_configuration_is_plain_json() -> None:
    values = json.loads(json.dumps(resolved().to_dict()))
    assert values["models"][0]["batch_size"]["reason"]


def test_a_variable_of_the_environment_is_named_as_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "config.properties"
    file.write_text("beeline_drain_seconds=5\nbeeline_stop_seconds=6\nbeeline_log_files=7\n")
    found = resolved(properties=load(file, {"BEELINE_DRAIN_SECONDS": "3", "BEELINE_JOB_QUEUE_SIZE": "40"}))
    assert found.numbers["beeline_drain_seconds"] == Setting(3, "environment BEELINE_DRAIN_SECONDS")
    assert found.numbers["beeline_stop_seconds"] == Setting(6, "config.properties")
    assert found.numbers["beeline_requests_per_second"] == Setting(400, "10 times job_queue_size")
    # Whoever ends its processes waits for both, and a little longer.
    assert found.stop_grace > 3 + 6
    assert resolved().numbers["beeline_drain_seconds"] == Setting(0, "default")
