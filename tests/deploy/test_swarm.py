"""The Swarm file, deployed: its limits, and a new version of the model without a failed request."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from archive.build import build
from archive.export import export_folder
from archive.variants import prepare
from host import silent
from serve.ports import Address, settle
from tests.archive.conftest import TinyNet, tiny_request
from tests.conftest import ROOT
from tests.deploy.conftest import Stack, build_image, docker, swarm
from tests.docker.conftest import Load, under_load, wait_until

FILE = ROOT / "deploy" / "swarm.yml"
NAME = "beeline-swarm-test"
FIRST, NEXT, BROKEN = (f"{NAME}:{tag}" for tag in ("first", "next", "broken"))
REPLICAS = 2
# Answers name the model's version.
ACCEPT = "application/vnd.beeline+json"


def services(file: Path) -> dict[str, Any]:
    """Return the services of a Compose file."""
    read: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))["services"]
    return read


def test_it_agrees_with_compose_and_publishes_no_management() -> None:
    ours, compose = services(FILE), services(ROOT / "docker-compose.yml")
    for name, service in ours.items():
        assert service["image"] == compose[name]["image"]
        assert service["stop_grace_period"] == compose[name]["stop_grace_period"]
        assert service["deploy"]["resources"]["limits"]["memory"] == compose[name]["mem_limit"]
        assert service["deploy"]["resources"]["limits"]["pids"] == compose[name]["pids_limit"]
    backend, gateway = (ours[name]["deploy"]["placement"] for name in ("backend", "gateway"))
    assert backend["constraints"] == ["node.labels.beeline != no"]
    assert backend["preferences"] == [{"spread": "node.labels.zone"}]
    assert gateway["constraints"] == ["node.labels.beeline_gateway != no"]
    # Management stays on each container's own loopback here.
    environment = dict(compose["backend"]["environment"])
    del environment["BEELINE_MANAGEMENT_ADDRESS"]
    assert {key: str(value) for key, value in environment.items()} == ours["backend"]["environment"]
    published = [port["target"] for service in services(FILE).values() for port in service.get("ports", [])]
    assert sorted(published) == [8000, 8080]
    assert "8081" not in json.dumps(services(FILE))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of archives for each image: two versions of a model, and an archive that no index lists."""
    found = {}
    for image, version in ((FIRST, "1.0"), (NEXT, "2.0")):
        folder = tmp_path_factory.mktemp("version")
        export_folder(TinyNet(), tiny_request(version=version), folder / "export")
        # For the engine of the image, which is the default.
        made, _ = prepare(folder / "export", folder, (None, None), (None, None), (0.99, 0.1), "full", silent)
        build(made, folder / "model_store", check=False)
        found[image] = folder / "model_store"
    broken = tmp_path_factory.mktemp("version") / "model_store"
    shutil.copytree(found[NEXT], broken)
    (broken / "index.json").unlink()
    return {**found, BROKEN: broken}


@pytest.fixture(scope="module")
def stack(images: None, stores: dict[str, Path]) -> Iterator[Stack]:
    """The stack with two backends of version 1.0, ready; afterwards nothing of it is left."""
    ports = settle([(Address("127.0.0.1", 0), "") for _ in range(2)])
    # Small demands, so that any machine will do.
    settings = {
        "BEELINE_CPU_IMAGE": FIRST,
        "BACKEND_REPLICAS": str(REPLICAS),
        "BACKEND_CPUS": str(min(2, os.cpu_count() or 1)),
        "BACKEND_CPUS_RESERVED": "0.1",
        "BACKEND_MEMORY_RESERVED": "1g",
        "WORKERS": "1",
        "PAGE_PORT": str(ports[0].port),
        "API_PORT": str(ports[1].port),
    }
    running = Stack(NAME, FILE, settings)
    try:
        for image, store in stores.items():
            build_image(image, "beeline-cpu:0.1.0", store)
        with swarm():
            try:
                running.deploy()
                wait_until(lambda: ready(running) == REPLICAS, "the first backends")
                yield running
            finally:
                running.remove()
    finally:
        if built := docker("images", "--quiet", NAME).split():
            docker("rmi", "--force", *built)


def url(stack: Stack) -> str:
    return f"http://127.0.0.1:{stack.settings['API_PORT']}"


def ready(stack: Stack) -> int:
    """Return how many workers of the model the gateway knows to be ready; each backend has one."""
    try:
        models = requests.get(f"{url(stack)}/ping", timeout=5).json()["models"]
    except (requests.RequestException, ValueError):
        return 0
    return sum(version["ready"] for version in models.get("tiny", {}).values())


@pytest.mark.docker
@pytest.mark.parametrize("name", ["backend", "gateway"])
def test_a_container_has_the_limits_of_its_service(stack: Stack, name: str) -> None:
    limits = services(FILE)[name]["deploy"]["resources"]["limits"]
    containers = stack.containers(name)
    assert len(containers) == {"backend": REPLICAS, "gateway": 1}[name]
    for container in containers:
        seen = json.loads(docker("inspect", container))[0]
        host, check = seen["HostConfig"], seen["Config"]["Healthcheck"]
        assert host["ReadonlyRootfs"]
        assert host["CapDrop"] == ["ALL"]
        assert host["PidsLimit"] == limits["pids"]
        assert host["Memory"] == {"backend": 6 << 30, "gateway": 1500 << 20}[name]
        # Only the backend has such a limit: the gateway should never wait for a core.
        cores = int(stack.settings["BACKEND_CPUS"]) if name == "backend" else 0
        assert host["NanoCpus"] == cores * 10**9
        assert [(each["Type"], each["Target"]) for each in host["Mounts"]] == [("tmpfs", "/tmp")]
        assert seen["Config"]["User"] == "10001:10001"
        # The number of retries is from the file, the rest from the image.
        assert (check["Test"], check["Interval"], check["Retries"]) == (["CMD", "healthcheck"], 5 * 10**9, 60)
        # Swarm does not take this option.
        assert not host["SecurityOpt"]


@pytest.mark.docker
def test_management_is_reached_inside_a_backend_alone(stack: Stack) -> None:
    ports = [port["TargetPort"] for name in ("backend", "gateway") for port in ports_of(stack, name)]
    assert sorted(ports) == [8000, 8080]
    gateway, backend = stack.containers("gateway")[0], stack.containers("backend")[0]
    asked = 'exec 3<> "/dev/tcp/backend/$0" && echo open || echo shut'
    assert docker("exec", gateway, "bash", "-c", asked, "8080") == "open"
    assert docker("exec", gateway, "bash", "-c", asked, "8081") == "shut"
    for workers in (2, 1):
        said = docker("exec", backend, "beeline", "serve", "scale", "tiny", "--min", str(workers))
        assert f"tiny: {workers} workers ready" in said
    wait_until(lambda: ready(stack) == REPLICAS, "one worker a backend")


def ports_of(stack: Stack, name: str) -> list[dict[str, Any]]:
    return list(stack.service(name)["Endpoint"].get("Ports") or [])


def versions(load: Load, after: float = 0.0, before: float = float("inf")) -> set[str]:
    """Return the versions that answered the requests of a time."""
    answers = [answer for sent, answer in load.answers if after <= sent <= before]
    return {str(answer.json()["model"]["version"]) for answer in answers}


@pytest.mark.docker
def test_a_new_version_comes_without_a_failed_request(stack: Stack) -> None:
    """Two clients, each request on a new connection: a full queue's 429 would be no fault of the update.

    The model is a tiny network in the real handler, since two cores serve few ResNet-18 while another backend starts.
    """
    with under_load(url(stack), clients=2, model="tiny", Accept=ACCEPT) as load:
        load.wait_for(20)
        begun = time.monotonic()
        ended = stack.update(BEELINE_CPU_IMAGE=NEXT)
        done = time.monotonic()
        load.wait_for(20)
    print(f"\nupdated in {done - begun:.1f} s under load: {dict(load.statuses)}")
    assert load.failures == []
    assert ended == "completed"
    assert versions(load, before=begun) == {"1.0"}
    assert versions(load) == {"1.0", "2.0"}
    assert versions(load, after=done) == {"2.0"}
    assert stack.images("backend") == [NEXT] * REPLICAS


@pytest.mark.docker
def test_a_version_that_does_not_start_is_rolled_back(stack: Stack) -> None:
    before = stack.images("backend")
    with under_load(url(stack), clients=2, model="tiny", Accept=ACCEPT) as load:
        assert stack.update(BEELINE_CPU_IMAGE=BROKEN) == "rollback_completed"
        load.wait_for(20)
    assert load.failures == []
    assert len(versions(load)) == 1
    assert stack.images("backend") == before
