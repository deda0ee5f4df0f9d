"""What the servers get: command lines, runtime configuration, environment, archives."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import javaproperties
import pytest

from archive.mar import Archive, read
from serve import addresses, config
from serve.addresses import Ports
from serve.properties import Properties, load
from serve.servers import protocol
from serve.servers.mms import Mms
from serve.servers.protocol import Places, Runtime
from serve.servers.torchserve import TorchServe, models_json
from tests.conftest import ROOT, write_archive

ADDRESSES = addresses.resolve(Properties(Path("config.properties")), Ports(), "none")


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path / "scratch", tmp_path / "logs")


@pytest.fixture
def resolved() -> config.Configuration:
    overrides = config.Overrides(batch_size=4, workers=2, max_batch_delay=7)
    archives = (Archive(Path("/store/fake.mar"), "fake", "1.0"),)
    return config.resolve(Properties(Path("config.properties")), archives, overrides, {}, 2, 0, 10**10)


def written(
    kind: protocol.Server, resolved: config.Configuration, places: Places, at: addresses.Addresses = ADDRESSES
) -> dict[str, str]:
    places.temporary.mkdir()
    kind.write(resolved, at, places)
    return javaproperties.loads(places.properties.read_text())


def test_torchserve_reads_its_models_from_its_file(resolved: config.Configuration, places: Places) -> None:
    values = written(TorchServe(), resolved, places)
    entry = json.loads(values["models"])["fake"]["1.0"]
    assert (entry["batchSize"], entry["maxBatchDelay"]) == (4, 7)
    assert values["load_models"] == "fake.mar"
    assert int(values["max_request_size"]) == resolved.max_request_size
    assert values["allowed_urls"] == f"file://{places.store}/.*"
    assert values["enable_model_api"] == values["install_py_dep_per_model"] == "false"


def test_torchserve_installs_requirements_of_archives_where_the_file_says_so(places: Places, tmp_path: Path) -> None:
    (tmp_path / "config.properties").write_text("install_py_dep_per_model=true\n")
    archives = (Archive(Path("/store/fake.mar"), "fake", "1.0"),)
    resolved = config.resolve(load(tmp_path / "config.properties"), archives, config.Overrides(), {}, 2, 0, 10**10)
    assert written(TorchServe(), resolved, places)["install_py_dep_per_model"] == "true"


@pytest.mark.parametrize(
    ("kind", "handler", "requirements", "why", "said"),
    [
        (TorchServe(), "image_classifier", "", "captum", ["captum, which /python lacks", "main.txt captum`, or let"]),
        (TorchServe(), "own.py:handle", "needs.txt", "cv2.dnn", ["txt opencv-python-headless`", "its needs.txt: "]),
        (Mms(), "own.py", "needs.txt", "captum", ["put it into the archive", "mms.txt captum`"]),
        (Mms(), "image_classifier", "", "image_classifier", ["is neither in old.mar nor one of Multi Model Server's"]),
        (Mms(), "own.py", "", None, ["see `beeline serve logs`"]),
    ],
)  # fmt: skip
def test_a_missing_package_is_named_with_the_ways_to_bring_it(
    kind: protocol.Server, handler: str, requirements: str, why: str | None, said: list[str]
) -> None:
    archive = Archive(Path("/store/old.mar"), "old", "1.0", (), handler, requirements)
    reason = f"ModuleNotFoundError: No module named '{why}'" if why else "RuntimeError: the gate is shut"
    advice = kind.advice(archive, Path("/python"), reason)
    assert all(part in advice for part in said), advice
    assert ("install_py_dep_per_model" in advice) is (kind.name == "torchserve")


def test_a_missing_package_is_named_even_if_the_server_lost_the_workers_traceback(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "old.mar", "old", {"own.py": b"import json, absent_thing.part\n"}, "own.py")
    advice = Mms().advice(read(path), Path(sys.executable), "it logged no reason, as when memory runs out")
    assert f"its handler own.py imports absent_thing, which {sys.executable} lacks: " in advice


@pytest.mark.parametrize("kind", [TorchServe(), Mms()])
@pytest.mark.parametrize(("gateway", "queue"), [("none", "200"), ("nginx", "1200")])
def test_behind_a_gateway_the_servers_queue_takes_a_full_one_of_each_class_of_size(
    kind: protocol.Server, gateway: str, queue: str, resolved: config.Configuration, places: Places
) -> None:
    """The gateway answers 429 for a full queue; the server's own 503 would mean that it is not ready."""
    at = addresses.resolve(Properties(Path("config.properties")), Ports(), gateway)
    assert written(kind, resolved, places, at)["job_queue_size"] == queue


def test_torchserve_gets_the_same_numbers_as_from_the_projects_file_itself() -> None:
    path = ROOT / "config" / "config.properties"
    archives = (Archive(Path("/store/resnet18.mar"), "resnet18", "1.0"),)
    resolved = config.resolve(load(path), archives, config.Overrides(), {}, 2, 0, 10**10)
    ours = json.loads(models_json(resolved))["resnet18"]["1.0"]
    theirs = json.loads(javaproperties.loads(path.read_text())["models"])["resnet18"]["1.0"]
    # Its workers start in their turn.
    assert {key: ours[key] for key in theirs} == {**theirs, "minWorkers": 0}


def test_mms_gets_no_models_and_its_timeout_in_seconds(resolved: config.Configuration, places: Places) -> None:
    values = written(Mms(), resolved, places)
    assert "models" not in values
    assert values["default_response_timeout_seconds"] == "30"
    assert "default_response_timeout" not in values


def test_the_command_has_the_instances_folders_and_the_users_options(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A collector that the environment names is the only one.
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-XX:+UseParallelGC")
    monkeypatch.setattr("host.machine.cores", lambda: 2)
    runtime = Runtime(Path(sys.executable), ("/java/bin/java",), "test")
    command = TorchServe().command(runtime, places, "-Xmx1g -Xss1m")
    assert command[0] == "/java/bin/java"
    assert {f"-Djava.io.tmpdir={places.temporary}", "-XX:TieredStopAtLevel=1", "--disable-token-auth"} <= set(command)
    assert command[command.index("-Xmx1g") : command.index("-Xmx1g") + 2] == ["-Xmx1g", "-Xss1m"]
    assert "-XX:+UseSerialGC" not in command


def test_threads_and_limits_reach_the_workers_and_misleading_variables_do_not(
    resolved: config.Configuration, places: Places
) -> None:
    environ = {"TS_CONFIG_FILE": "x", "MMS_CONFIG_FILE": "x", "PYTHONPATH": "x", "PYTHONHASHSEED": "0", "HOME": "/h"}
    assert protocol.clean(environ) == {"PYTHONHASHSEED": "0", "HOME": "/h"}
    environment = protocol.environment(TorchServe(), Path(sys.executable), resolved, places)
    assert environment["BEELINE_THREADS"] == environment["OMP_NUM_THREADS"] == "1"
    assert environment["BEELINE_LONE_THREADS"] == "2"
    assert environment["BEELINE_MAX_BYTES"] == "20000000"
    assert environment["TMPDIR"] == environment["TEMP"] == str(places.temporary)


def test_a_served_archive_stays_as_it_was_when_it_is_built_again(
    resolved: config.Configuration, tmp_path: Path
) -> None:
    archive = Archive(tmp_path / "fake.mar", "fake", "1.0")
    archive.path.write_text("old")
    places = Places(tmp_path / "scratch", tmp_path / "logs")
    protocol.lay_out(TorchServe(), resolved, ADDRESSES, [archive], places)
    (tmp_path / "new.mar").write_text("new")
    (tmp_path / "new.mar").replace(archive.path)
    assert (places.store / "fake.mar").read_text() == "old"
    # Other users may pass through to the gateway's folder, and neither list nor read.
    assert places.temporary.stat().st_mode & 0o066 == 0
    assert places.store.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("cores", "own", "policy"), [(1, None, "PASSIVE"), (1, "ACTIVE", "ACTIVE"), (99, None, None), (99, "ACTIVE", None)]
)
def test_threads_that_wait_sleep_under_a_quota_of_cpu_time(
    resolved: config.Configuration,
    places: Places,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    own: str | None,
    policy: str | None,
) -> None:
    monkeypatch.setattr("serve.servers.protocol.machine.cores", lambda: cores)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(8))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if own is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", own)
    environment = protocol.environment(TorchServe(), Path(sys.executable), resolved, places)
    assert environment.get("OMP_WAIT_POLICY") == policy
