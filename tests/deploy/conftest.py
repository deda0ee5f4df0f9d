"""A stack on a container engine that leaves nothing behind."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.docker.conftest import BUILD, run, wait_until
from tests.docker.conftest import engine as engine

# The engine makes this network for a first swarm and keeps it.
_BRIDGE = "docker_gwbridge"
# Swarm's states of an update that has ended.
ENDED = ("completed", "paused", "rollback_completed", "rollback_paused")


def docker(*words: str, settings: dict[str, str] | None = None, folder: Path = ROOT) -> str:
    """Run one command of the engine's client and return its output."""
    return run("docker", *words, cwd=folder, env={**os.environ, **(settings or {})}).strip()


@pytest.fixture(scope="session")
def images(engine: None) -> None:
    """The project's images of this tree, as docker-compose.yml builds them."""
    docker("compose", "build", "backend", "gateway", settings=BUILD)


@contextmanager
def swarm() -> Iterator[None]:
    """Be a swarm's manager: of the existing swarm, or of a new one for the block."""
    if docker("info", "--format", "{{.Swarm.LocalNodeState}}") != "inactive":
        yield
        return
    bridge = docker("network", "ls", "--quiet", "--filter", f"name=^{_BRIDGE}$")
    docker("swarm", "init", "--advertise-addr", "127.0.0.1")
    try:
        yield
    finally:
        docker("swarm", "leave", "--force")
        if not bridge:
            wait_until(_without_bridge, "the swarm's bridge is removed", 60)


def _without_bridge() -> bool:
    """Remove the bridge, which the engine may keep for a moment."""
    run("docker", "network", "rm", _BRIDGE, check=False)
    return not docker("network", "ls", "--quiet", "--filter", f"name=^{_BRIDGE}$")


@dataclass
class Stack:
    """A running stack: its name, its file, and the settings of its deployment."""

    name: str
    file: Path
    settings: dict[str, str]

    def deploy(self, **settings: str) -> None:
        """Deploy the file with these settings changed; the images are on this machine alone."""
        self.settings |= settings
        words = ("stack", "deploy", "--resolve-image", "never", "--compose-file", str(self.file), self.name)
        docker(*words, settings=self.settings)

    def service(self, name: str) -> Any:
        """Return the engine's description of a service."""
        return json.loads(docker("service", "inspect", f"{self.name}_{name}"))[0]

    def containers(self, name: str, *options: str) -> list[str]:
        """Return the ids of a service's running containers."""
        label = f"label=com.docker.swarm.service.name={self.name}_{name}"
        return docker("ps", "--quiet", "--filter", label, *options).split()

    def images(self, name: str) -> list[str]:
        """Return the image of each of a service's running containers."""
        return [docker("inspect", "--format", "{{.Config.Image}}", each) for each in self.containers(name)]

    def update(self, **settings: str) -> str:
        """Deploy, wait until Swarm is done, and return the state in which the update ended."""
        before = (self.service("backend").get("UpdateStatus") or {}).get("StartedAt")
        self.deploy(**settings)

        def done() -> bool:
            status = self.service("backend").get("UpdateStatus") or {}
            return status.get("StartedAt") != before and status.get("State") in ENDED

        wait_until(done, "the update of the backends", 600)
        return str(self.service("backend")["UpdateStatus"]["State"])

    def left(self) -> dict[str, list[str]]:
        """Return the ids of its remaining parts, by kind."""
        mine = ("--quiet", "--filter", f"label=com.docker.stack.namespace={self.name}")
        found = {kind: docker(kind, "ls", *mine).split() for kind in ("service", "network", "config", "volume")}
        found["container"] = docker("ps", "--all", *mine).split()
        return {kind: ids for kind, ids in found.items() if ids}

    def remove(self) -> None:
        """Remove it, and wait until nothing of it is left."""
        docker("stack", "rm", self.name)
        wait_until(lambda: not self.left(), "the end of the stack", 120)


def build_image(tag: str, base: str, store: Path) -> None:
    """Build an image with the archives of a folder, by the two lines in deploy/swarm.yml."""
    (store.parent / "Dockerfile").write_text(f"FROM {base}\nCOPY {store.name} /model_store\n")
    docker("build", "--quiet", "--tag", tag, ".", folder=store.parent)
