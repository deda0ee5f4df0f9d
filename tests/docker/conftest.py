"""A real container engine: images built from a clean copy of this tree, services of the compose file, load on them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "tests" / "pictures"
CIRCLES, STRIPES = (PICTURES / f"{name}.jpg" for name in ("circles", "stripes"))
PROJECT = "beeline-test"
# Of a compose file that is alone in its folder.
ALONE = f"{PROJECT}-alone"
PAGE, API, MANAGEMENT = "http://localhost:8000", "http://localhost:8080", "http://localhost:8081"
# Of every container that these tests start without Compose.
LABEL = "beeline-test"
# The same images with and without a network: drawn pictures, and no weights to start from. The pictures are small:
# training at the usual size takes longer than all tests of the result.
BUILD = {"TRAINING": "--generated fit=scratch fit.epochs=10 model.resize=128 model.crop=112"}
# Seconds that Compose and `docker stop` give a container to end.
GRACE = "70"
# Seconds for a container to become ready on a machine that others use too.
PATIENCE = 600


def run(*command: str, check: bool = True, **options: Any) -> str:
    """Run a command and return its output; show all of it where the command fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout if check else done.stdout + done.stderr


def wait_until(holds: Callable[[], object], what: str, patience: float = PATIENCE) -> float:
    """Wait until it holds; return the seconds that took."""
    begun = time.monotonic()
    while not holds():
        assert time.monotonic() - begun < patience, f"{what}: not in {patience:g} s"
        time.sleep(0.2)
    return time.monotonic() - begun


def ping(url: str) -> int:
    """Return the status of /ping; 0 where nothing answers."""
    try:
        return requests.get(f"{url}/ping", timeout=5).status_code
    except requests.RequestException:
        return 0


def predict(
    picture: Path = CIRCLES, url: str = API, agent: str = "tests", model: str = "resnet18", **headers: str
) -> requests.Response:
    """Send a picture over a connection of its own, so that no old one can be at fault."""
    # `close`: a kept answer would keep its connection open.
    headers = {"User-Agent": agent, "Connection": "close", **headers}
    return requests.put(f"{url}/predictions/{model}", data=picture.read_bytes(), headers=headers, timeout=120)


def access_lines(text: str, agent: str = "") -> list[dict[str, Any]]:
    """Return the lines of requests in a gateway's output, all or those of one agent."""
    # Compose may put a code for terminals before each line.
    found = [line.partition('{"time"') for line in text.splitlines()]
    lines = [json.loads(sign + rest) for _, sign, rest in found if sign]
    return [line for line in lines if agent in ("", line["agent"])]


def asked(line: dict[str, Any]) -> list[str]:
    """Return the backends that got a request; the last of them answered."""
    return [each for each in str(line["backend"]).split(", ") if each]


@dataclass
class Load:
    """The answers of clients, each with the time at which its request was sent, and their failures.

    `agent` marks the requests in the gateway's log. After the time `closing` the gateway may be closed: then a
    connection that is `refused` or `cut` is no failure. The kernel takes a connection before nginx does, and cuts those
    that nginx never saw when nginx closes; a client cannot tell, but nginx's log has none of them.
    """

    answers: list[tuple[float, requests.Response]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    refused: int = 0
    cut: int = 0
    closing: float = float("inf")
    agent: str = field(default_factory=lambda: f"load-{uuid.uuid4().hex}")

    @property
    def statuses(self) -> Counter[int]:
        """The number of answers of each status."""
        return Counter(answer.status_code for _, answer in self.answers)

    def wait_for(self, more: int) -> None:
        """Wait for so many more answers, or for a failure."""
        goal = len(self.answers) + more
        wait_until(lambda: self.failures or len(self.answers) >= goal, f"{more} more answers")

    def one(self, **request: Any) -> None:
        """Send one request and note its end."""
        sent = time.monotonic()
        try:
            answer = predict(agent=self.agent, **request)
            self.answers.append((sent, answer))
            if answer.status_code != 200:
                self.failures.append(f"{answer.status_code}: {answer.text.strip()}")
        except requests.RequestException as error:
            if sent > self.closing and not isinstance(error, requests.ReadTimeout):
                unheard = isinstance(getattr(error.args[0], "reason", None), (NewConnectionError, ConnectTimeoutError))
                self.cut, self.refused = self.cut + (not unheard), self.refused + unheard
                time.sleep(0.05)
            else:
                self.failures.append(f"{type(error).__name__}: {error}")


@contextmanager
def under_load(url: str = API, clients: int = 6, **request: Any) -> Iterator[Load]:
    """Let so many clients send one request after the other while the block runs."""
    load, stop = Load(), threading.Event()

    def ask() -> None:
        while not stop.is_set():
            load.one(url=url, **request)

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield load
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@dataclass(frozen=True)
class Compose:
    """The compose file of a clean copy of this tree, under a project name of its own."""

    folder: Path
    spelling: tuple[str, ...] = ("docker", "compose")

    def __call__(self, *words: str, check: bool = True, **variables: str) -> str:
        """Run a command of Compose in the copy."""
        environ = {**os.environ, **BUILD, **variables}
        return run(*self.spelling, "-p", PROJECT, *words, check=check, cwd=self.folder, env=environ)

    def containers(self, service: str) -> list[str]:
        """Return the ids of a service's running containers."""
        return self("ps", "-q", service).split()

    def logs(self, service: str) -> str:
        """Return what a service's containers printed."""
        return self("logs", "--no-color", "--no-log-prefix", service)

    def access_log(self, agent: str = "", least: int = 0) -> list[dict[str, Any]]:
        """Return the gateway's lines of requests, all or those of one agent, once there are so many."""
        wait_until(lambda: len(access_lines(self.logs("gateway"), agent)) >= least, f"the log has {least} requests")
        return access_lines(self.logs("gateway"), agent)


def inspect(container: str) -> dict[str, Any]:
    """Return the engine's description of a container."""
    values: dict[str, Any] = json.loads(run("docker", "inspect", container))[0]
    return values


def inside(container: str, *command: str, check: bool = True) -> str:
    """Run a command in a container."""
    return run("docker", "exec", container, *command, check=check)


def leftovers() -> str:
    """Name every container, network and volume that these tests made, under either project."""
    project = "com.docker.compose.project"
    labels = (f"{project}={PROJECT}", f"{project}={ALONE}", LABEL)
    kinds = (("ps", "-a"), ("network", "ls"), ("volume", "ls"))
    return "".join(run("docker", *kind, "--filter", f"label={label}", "-q") for kind in kinds for label in labels)


@pytest.fixture(scope="session")
def engine() -> None:
    """Skip where no container engine answers."""
    if shutil.which("docker") is None or "Server" not in run("docker", "version", check=False):
        pytest.skip("no container engine answers: start one, with Compose v2, and run `make test-docker` again")


@pytest.fixture(scope="session")
def compose(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    """Build the images from a copy with the files of a clone and those that are not committed yet."""
    folder = tmp_path_factory.mktemp("clone") / "beeline"
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    made = Compose(folder)
    begun = time.monotonic()
    made("--profile", "mms", "--profile", "archive", "build", "--quiet")
    print(f"\nimages built in {time.monotonic() - begun:.0f} s")
    yield made
    made("--profile", "*", "down", "--volumes", "--remove-orphans")
    assert leftovers() == ""


@pytest.fixture(scope="session")
def site(compose: Compose) -> Compose:
    """The services of `docker compose up`, ready."""
    compose("up", "--detach")
    seconds = wait_until(lambda: ping(API) == 200, "the gateway's /ping is 200")
    print(f"ready {seconds:.1f} s after `docker compose up`")
    return compose


@pytest.fixture
def lone(compose: Compose) -> Iterator[Callable[..., str]]:
    """Run single containers, as users do with `docker run`, and return their ids."""
    made: list[str] = []

    def start(image: str, *options: str, words: Sequence[str] = ()) -> str:
        container = run("docker", "run", "--detach", "--label", LABEL, *options, image, *words).strip()
        made.append(container)
        return container

    yield start
    for container in made:
        run("docker", "rm", "--force", "--volumes", container)
