"""A container engine, a stack on it that leaves nothing behind, and clients that never wait for each other."""

from __future__ import annotations

import collections
import http.client
import io
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.docker.conftest import BUILD, run, wait_until
from tests.docker.conftest import engine as engine

# What the engine makes for a first swarm and leaves when that is left.
_BRIDGE = "docker_gwbridge"
# How an update ends, in Swarm's words.
ENDED = ("completed", "paused", "rollback_completed", "rollback_paused")
ACCEPT = "application/vnd.beeline+json"


def docker(*words: str, settings: dict[str, str] | None = None, folder: Path = ROOT) -> str:
    """Run one command of the engine's client and return what it says."""
    return run("docker", *words, cwd=folder, env={**os.environ, **(settings or {})}).strip()


@pytest.fixture(scope="session")
def images(engine: None) -> None:
    """The project's images as this tree makes them; as docker-compose.yml builds them."""
    docker("compose", "build", "backend", "gateway", settings=BUILD)


@contextmanager
def swarm() -> Iterator[None]:
    """Be a swarm's manager: of the one that is there, or of one of our own for as long."""
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
    """Remove what the engine may hold on to for a moment after the swarm is left."""
    run("docker", "network", "rm", _BRIDGE, check=False)
    return not docker("network", "ls", "--quiet", "--filter", f"name=^{_BRIDGE}$")


@dataclass
class Stack:
    """A stack that runs: its name, and the settings that its file was deployed with."""

    name: str
    file: Path
    settings: dict[str, str]

    def deploy(self, **settings: str) -> None:
        """Deploy the file with these settings changed; the images are on this machine alone."""
        self.settings |= settings
        words = ("stack", "deploy", "--resolve-image", "never", "--compose-file", str(self.file), self.name)
        docker(*words, settings=self.settings)

    def service(self, name: str) -> Any:
        """Return what the engine knows of a service."""
        return json.loads(docker("service", "inspect", f"{self.name}_{name}"))[0]

    def containers(self, name: str, *options: str) -> list[str]:
        """Return the ids of a service's running containers."""
        label = f"label=com.docker.swarm.service.name={self.name}_{name}"
        return docker("ps", "--quiet", "--filter", label, *options).split()

    def images(self, name: str) -> list[str]:
        """Return the image of each of a service's running containers."""
        return [docker("inspect", "--format", "{{.Config.Image}}", each) for each in self.containers(name)]

    def update(self, **settings: str) -> str:
        """Deploy, wait until Swarm is done, and return in its word how it ended."""
        before = (self.service("backend").get("UpdateStatus") or {}).get("StartedAt")
        self.deploy(**settings)

        def done() -> bool:
            status = self.service("backend").get("UpdateStatus") or {}
            return status.get("StartedAt") != before and status.get("State") in ENDED

        wait_until(done, "the update of the backends", 600)
        return str(self.service("backend")["UpdateStatus"]["State"])

    def left(self) -> dict[str, list[str]]:
        """Return what is still there of it, by kind."""
        mine = ("--quiet", "--filter", f"label=com.docker.stack.namespace={self.name}")
        found = {kind: docker(kind, "ls", *mine).split() for kind in ("service", "network", "config", "volume")}
        found["container"] = docker("ps", "--all", *mine).split()
        return {kind: ids for kind, ids in found.items() if ids}

    def remove(self) -> None:
        """Remove it, and see that nothing of it stays."""
        docker("stack", "rm", self.name)
        wait_until(lambda: not self.left(), "the end of the stack", 120)


@dataclass(frozen=True)
class Answer:
    """What one request came to: when it was sent, in seconds of the clock, and how long it took.

    `said` is the model's version; where the request failed, in what way.
    """

    sent: float
    seconds: float
    good: bool
    said: str


@dataclass
class Load:
    """Clients at a constant rate, each on a connection of its own, whether the others have their answers or not."""

    host: str
    port: int
    path: str
    rate: float
    answers: list[Answer] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._pictures = [photograph(seed) for seed in range(8)]
        self._begun = time.monotonic()

    def capacity(self, seconds: float = 6.0, clients: int = 8) -> float:
        """Return how many requests a second are answered where each client asks again when it has its answer."""
        end = time.monotonic() + seconds

        def ask() -> None:
            while time.monotonic() < end:
                self._ask(self._pictures[0])

        with ThreadPoolExecutor(clients) as pool:
            for _ in range(clients):
                pool.submit(ask)
        answered = len(self.answers) - len(self.failures())
        self.answers.clear()
        return answered / seconds

    def __enter__(self) -> Load:
        self._begun = time.monotonic()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _send(self) -> None:
        # So many may be under way: at 50 a second, all of ten seconds.
        with ThreadPoolExecutor(max_workers=500) as pool:
            number = 0
            while not self._stop.wait(max(0.0, self._begun + number / self.rate - time.monotonic())):
                pool.submit(self._ask, self._pictures[number % len(self._pictures)])
                number += 1

    def _ask(self, picture: bytes) -> None:
        sent = time.monotonic()
        connection = http.client.HTTPConnection(self.host, self.port, timeout=90)
        try:
            connection.request("POST", self.path, picture, {"Accept": ACCEPT, "Connection": "close"})
            answer = connection.getresponse()
            body = answer.read()
            good = answer.status == 200
            said = str(json.loads(body)["model"]["version"]) if good else f"{answer.status} {body[:200]!r}"
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            good, said = False, repr(error)
        finally:
            connection.close()
        self.answers.append(Answer(sent - self._begun, time.monotonic() - sent, good, said))

    def now(self) -> float:
        """Return seconds since it began."""
        return time.monotonic() - self._begun

    def failures(self) -> list[Answer]:
        """Return the requests that were not answered with 200."""
        return [each for each in self.answers if not each.good]

    def report(self, what: str) -> None:
        """Say what was seen."""
        sent = [each.sent for each in self.answers]
        took = sorted(each.seconds for each in self.answers)
        counts = dict(collections.Counter(each.said for each in self.answers))
        # Figures for whoever looks; none of them is a test.
        print(
            f"{what}: {len(sent)} requests in {max(sent):.1f} s, {len(sent) / max(sent):.1f} a second sent "
            f"(at {self.rate:.1f}), "
            f"{len(self.failures())} failed; by version {counts}; "
            f"p50 {1000 * took[len(took) // 2]:.0f} ms, p99 {1000 * took[len(took) * 99 // 100]:.0f} ms, "
            f"longest {took[-1]:.1f} s"
        )


def photograph(seed: int) -> bytes:
    """Return a JPEG with what makes photographs large: blurred colours and grain, as the camera has."""
    random = np.random.default_rng(seed)
    colours = Image.fromarray(random.integers(0, 256, (6, 9, 3), dtype=np.uint8))
    grain = random.normal(0, 12, (213, 320, 3))
    pixels = np.asarray(colours.resize((320, 213), Image.Resampling.BICUBIC)) + grain
    target = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(target, "JPEG", quality=90)
    return target.getvalue()


def build_image(tag: str, base: str, store: Path) -> None:
    """Build an image with the archives of a folder, by the two lines that deploy/swarm.yml shows."""
    (store.parent / "Dockerfile").write_text(f"FROM {base}\nCOPY {store.name} /model_store\n")
    docker("build", "--quiet", "--tag", tag, ".", folder=store.parent)
