"""`config.properties` is read strictly, with one sentence for each mistake; a change of numbers keeps all else."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from beeline.errors import ConfigError
from serve.ports import Address
from serve.properties import DEFAULTS, VARIABLES, Change, change, load
from tests.conftest import ROOT

ENTRY = 'models={"fake": {"1.0": {%s}}}'
TUNED = {"minWorkers": 2, "maxWorkers": 2, "batchSize": 32, "maxBatchDelay": 10}


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
        ("install_py_dep_per_model=yes", "install_py_dep_per_model is 'yes'; allowed: true or false"),
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
        ("beeline_kserve=yes", "beeline_kserve is 'yes'; allowed: true or false"),
        ("beeline_url_host=a.test", "unknown key beeline_url_host; did you mean 'beeline_url_hosts'?"),
        (
            "beeline_url_hosts=https://a.test/",
            "beeline_url_hosts is 'https://a.test/'; allowed: host names with commas",
        ),
        ("beeline_url_hosts=*", "beeline_url_hosts is '*'; allowed: host names with commas"),
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
    # A mistake in the file is still found.
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


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A copy of the project's own file."""
    path = tmp_path / "config.properties"
    path.write_bytes((ROOT / "config" / "config.properties").read_bytes())
    return path


def numbers(path: Path, model: str = "resnet18", version: str = "1.0") -> dict[str, int]:
    return dict(load(path).models[model][version].numbers)


def test_only_the_numbers_of_the_model_change_and_only_when_they_are_written(own: Path) -> None:
    before = own.read_text()
    made = change(own, "resnet18", "1.0", TUNED, None)
    assert own.read_text() == before
    assert made.diff.startswith("--- config.properties (now)")
    assert {'-      "batchSize": 8,\\', '+      "batchSize": 32,\\'} <= set(made.diff.splitlines())
    made.write()
    changed = {
        ('      "minWorkers": 1,\\', '      "minWorkers": 2,\\'),
        ('      "maxWorkers": 4,\\', '      "maxWorkers": 2,\\'),
        ('      "batchSize": 8,\\', '      "batchSize": 32,\\'),
        ('      "maxBatchDelay": 2\\', '      "maxBatchDelay": 10\\'),
    }
    pairs = zip(before.splitlines(), own.read_text().splitlines(), strict=True)
    assert {pair for pair in pairs if pair[0] != pair[1]} == changed
    assert change(own, "resnet18", "1.0", TUNED, None).diff == ""


def test_threads_are_written_below_their_comment_or_in_place_of_the_old_ones(own: Path) -> None:
    change(own, "resnet18", "1.0", TUNED, 3).write()
    text = own.read_text()
    assert "#beeline_threads=1\nbeeline_threads=3\n\n# Threads for a picture that comes alone" in text
    assert load(own).numbers["beeline_threads"] == 3
    change(own, "resnet18", "1.0", TUNED, 1).write()
    assert "#beeline_threads=1\nbeeline_threads=1\n" in own.read_text()
    assert own.read_text().count("\nbeeline_threads=") == 1


def test_a_model_gets_an_entry_unless_its_only_one_is_of_another_version(own: Path) -> None:
    change(own, "squeezenet", "2.0", TUNED, None).write()
    assert numbers(own, "squeezenet", "2.0") == TUNED
    assert numbers(own)["batchSize"] == 8
    assert "# Requests that the server holds" in own.read_text()
    change(own, "resnet18", "3.0", TUNED, None).write()
    assert numbers(own)["batchSize"] == 32
    assert set(load(own).models["resnet18"]) == {"1.0"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing but this",
        "job_queue_size=5\n",
        "models={}\n",
        'models = {"fake": {}}\n# after\n',
        'models:{"fake":{"1.0":{"batchSize":8}}}',
        'models={"other": {"1.0": {"batchSize": 3}},\\\n  "fake": {"1.0": {\\\n "batchSize" : 8 }}}\n',
        'models={\\\r\n  "fake": {\\\r\n    "1.0": {\\\r\n  "batchSize": 8\\\r\n    }}\\\r\n}\r\njob_queue_size=5\r\n',
        'models={"f\\u0061ke": {"1.0": {"batchSize": 8}}}\n',
        'beeline_threads = 4\nmodels={"fake": {"1.0": {"minWorkers": 1, "maxWorkers": 9}}}\n',
    ],
)
def test_every_form_of_the_file_is_changed_to_the_same_numbers(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.properties"
    path.write_bytes(text.encode())
    known = load(path).numbers
    change(path, "fake", "1.0", TUNED, 1).write()
    assert numbers(path, "fake") == TUNED
    assert load(path).numbers == {**known, "beeline_threads": 1}
    written = path.read_bytes().decode()
    for line in text.splitlines():
        if line.startswith(("#", "job")):
            assert line in written
    if "\r\n" in text:
        assert written.count("\n") == written.count("\r\n")


def test_the_file_is_replaced_in_one_step_and_keeps_its_mode(own: Path) -> None:
    own.chmod(0o640)
    link = own.with_name("link.properties")
    link.symlink_to(own)
    change(link, "resnet18", "1.0", TUNED, None).write()
    assert link.is_symlink()
    assert numbers(own)["batchSize"] == 32
    assert stat.S_IMODE(own.stat().st_mode) == 0o640
    assert {path.name for path in own.parent.iterdir()} == {own.name, link.name}


def test_a_file_that_changed_meanwhile_or_cannot_be_written_is_one_sentence(own: Path, tmp_path: Path) -> None:
    made = change(own, "resnet18", "1.0", TUNED, None)
    own.write_text(own.read_text() + "vmargs=-Xmx1g\n")
    with pytest.raises(ConfigError, match="changed while it was tuned"):
        made.write()
    assert "vmargs" in own.read_text()
    gone = Change(tmp_path / "gone" / "config.properties", "a", "b")
    with pytest.raises(ConfigError, match="cannot be written"):
        gone.write()
