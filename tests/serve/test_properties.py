"""`config.properties` is read strictly: each mistake is one sentence that names place, value and fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from beeline.errors import ConfigError
from serve.ports import Address
from serve.properties import DEFAULTS, VARIABLES, load
from tests.conftest import ROOT

ENTRY = 'models={"fake": {"1.0": {%s}}}'


def test_the_projects_own_file_is_valid() -> None:
    properties = load(ROOT / "config" / "config.properties")
    entry = properties.models["resnet18"]["1.0"]
    assert entry.numbers["batchSize"] == 8
    assert entry.mar_name == "resnet18.mar"
    assert properties.numbers["beeline_max_image_bytes"] == 20_000_000
    assert properties.addresses["management_address"] == Address("127.0.0.1", 8081)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("job_queue_sise=3", ":1: unknown key job_queue_sise; did you mean 'job_queue_size'?"),
        ("# one\n\nload_models=all", ":3: load_models is set by `beeline serve up`"),
        ("max_request_size=1", "derived from beeline_max_image_bytes"),
        *(
            (f"beeline_log_files={text}", f"beeline_log_files is '{text}'; allowed: a whole number of files, 1 to 100")
            for text in ("", "0", "101", "1.5", "8.0", "1_0", "two", "True")
        ),
        ("job_queue_size=1\njob_queue_size=2", ":2: job_queue_size is set twice"),
        ("inference_address=8080", "inference_address is '8080'; allowed: http://HOST:PORT"),
        ("inference_address=http://127.0.0.1:99999", "allowed: http://HOST:PORT"),
        ('models={"fake": {"1.0": {"batchSize": 8,}}}', "models is not JSON near"),
        (f"models={'[' * 100_000}", ":1: models is nested too deeply"),
        ('models={"fake": {"1.0": {"batchSize": 8, "batchSize": 9}}}', "models has the key 'batchSize' twice"),
        ("models=[]", "models is []; allowed: a JSON object"),
        ('models={"vmargs": 3}', "models.vmargs is 3; allowed: a JSON object {model:"),
        (ENTRY % '"batchsize": 8', "unknown key models.fake.1.0.batchsize; did you mean 'batchSize'?"),
        *(
            (
                ENTRY % f'"batchSize": {text}',
                f"models.fake.1.0.batchSize is {value}; allowed: a whole number of requests",
            )
            for text, value in (('"8"', "'8'"), ("true", True), ("8.5", 8.5), ("8.0", 8.0), ("null", None))
        ),
        (ENTRY % '"batch_size": 8', "unknown key models.fake.1.0.batch_size; did you mean 'batchSize'?"),
        (ENTRY % '"maxBatchDelay": 0', "maxBatchDelay is 0; allowed: a whole number of milliseconds, 1 to 60000"),
        (ENTRY % '"minWorkers": 3, "maxWorkers": 2', "; allowed: maxWorkers of at least minWorkers (3)"),
        (ENTRY % '"marName": "fake"', "models.fake.1.0.marName is 'fake'; allowed: the name of a .mar file"),
        (ENTRY % '"defaultVersion": 1', "models.fake.1.0.defaultVersion is 1; allowed: true or false"),
        ("beeline_max_image_bytes=\\u00zz", "cannot be read"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "config.properties"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_continued_lines_and_comments_are_javas(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.properties is missing"):
        load(tmp_path / "nothing.properties")
    path = tmp_path / "config.properties"
    path.write_text('! a comment\nvmargs = -Xmx1g \\\n  -Xss1m\nmodels: {"fake": {"1.0": \\\n  {"minWorkers": 2}}}\n')
    properties = load(path)
    assert properties.texts["vmargs"] == "-Xmx1g -Xss1m"
    assert properties.models["fake"]["1.0"].numbers == {"minWorkers": 2}


def test_variables_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.properties"
    path.write_text("job_queue_size=3\nbeeline_stop_seconds=9\ninference_address=http://127.0.0.1:1\nvmargs=-Xmx1g\n")
    environ = {
        "BEELINE_JOB_QUEUE_SIZE": " 7 ",
        "BEELINE_DRAIN_SECONDS": "0",
        "BEELINE_INFERENCE_ADDRESS": "http://0.0.0.0:8080",
        "BEELINE_VMARGS": "-Xmx2g",
        # A Compose file passes on empty variables.
        "BEELINE_STOP_SECONDS": " ",
        # Another program's, without the prefix.
        "JOB_QUEUE_SIZE": "8",
    }
    properties = load(path, environ)
    assert properties.numbers == {"job_queue_size": 7, "beeline_stop_seconds": 9, "beeline_drain_seconds": 0}
    assert properties.addresses == {"inference_address": Address("0.0.0.0", 8080)}
    assert properties.texts == {"vmargs": "-Xmx2g"}
    assert properties.source("job_queue_size") == "environment BEELINE_JOB_QUEUE_SIZE"
    assert properties.source("beeline_stop_seconds") == "config.properties"
    assert load(path).numbers["job_queue_size"] == 3


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "BEELINE_JOB_QUEUE_SIZE",
            "many",
            "job_queue_size is 'many'; allowed: a whole number of requests, 1 to 100000",
        ),
        (
            "BEELINE_DRAIN_SECONDS",
            "601",
            "beeline_drain_seconds is '601'; allowed: a whole number of seconds, 0 to 600",
        ),
        ("BEELINE_METRICS_ADDRESS", "8082", "beeline_metrics_address is '8082'; allowed: http://HOST:PORT"),
        ("BEELINE_MANAGEMENT_ADDRESS", "https://a:1", "management_address is 'https://a:1'; allowed: http:"),
        ("BEELINE_TLS_ADDRESS", "http://0.0.0.0:1", "beeline_tls_address is 'http://0.0.0.0:1'; allowed: https:"),
    ],
)
def test_a_mistake_in_a_variable_names_the_variable(tmp_path: Path, name: str, value: str, said: str) -> None:
    path = tmp_path / "config.properties"
    path.write_text("job_queue_size=3\n")
    with pytest.raises(ConfigError) as caught:
        load(path, {name: value})
    assert str(caught.value).startswith(f"environment {name}: {said}")
    # A mistake in the file is one all the same.
    path.write_text("job_queue_size=3\njob_queue_sise=4\n")
    with pytest.raises(ConfigError, match=":2: unknown key job_queue_sise"):
        load(path, {name: value})


def test_every_key_but_models_has_a_variable_and_a_misspelt_one_is_refused(tmp_path: Path) -> None:
    assert sorted(VARIABLES.values()) == sorted(set(DEFAULTS) - {"models"})
    # These mean something else.
    others = dict.fromkeys(("BEELINE_STATE", "BEELINE_BACKENDS", "BEELINE_SERVER", "BEELINE_DEVICE"), "x")
    assert not set(others) & set(VARIABLES)
    path = tmp_path / "config.properties"
    path.write_text("")
    assert load(path, others).variables == {}
    with pytest.raises(ConfigError, match="unknown variable BEELINE_JOB_QUEUE_SISE; did you mean 'BEELINE_JOB_QUEUE_"):
        load(path, {"BEELINE_JOB_QUEUE_SISE": "8"})
