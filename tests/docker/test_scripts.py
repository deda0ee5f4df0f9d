"""The images' shell scripts, run here with a stub of `beeline`, and the time that a container has to end."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socket import create_server

import pytest
import yaml

from tests.conftest import ROOT
from tests.docker.conftest import GRACE

DOCKER = ROOT / "docker"
STUB = '#!/bin/sh\necho "WORKERS=${WORKERS-unset}"\nfor word; do echo "<$word>"; done\n'
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
FILES = ("docker-compose.yml", "awsei-docker-compose.yml", "deploy/swarm.yml")
# Seconds that the supervisor adds before it ends what is left by force.
FORCE = 2
LONGEST_DRAIN = 5
Run = Callable[..., list[str]]


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A folder instead of the store that is built into the image, with an archive."""
    (tmp_path / "built").mkdir()
    (tmp_path / "built" / "a.mar").touch()
    return tmp_path / "built"


@pytest.fixture
def mounted(tmp_path: Path) -> Path:
    """An empty folder instead of /model_store."""
    (tmp_path / "mounted").mkdir()
    return tmp_path / "mounted"


@pytest.fixture
def run(tmp_path: Path, built: Path, mounted: Path) -> Run:
    """Run the entrypoint with a stub of `beeline`, and of `nvidia-smi` where given; return its output."""
    script = (DOCKER / "entrypoint").read_text()
    script = script.replace("/opt/beeline/model_store", str(built)).replace("/model_store", str(mounted))

    def start(*words: str, gpus: str | None = None, **environ: str) -> list[str]:
        program(tmp_path / "beeline", STUB)
        if gpus is not None:
            program(tmp_path / "nvidia-smi", f"#!/bin/sh\n{gpus}\n")
        program(tmp_path / "entrypoint", script)
        path = f"{tmp_path}:/usr/bin:/bin"
        command = [str(tmp_path / "entrypoint"), *words]
        done = subprocess.run(command, env={"PATH": path, **environ}, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout.splitlines()

    return start


def options(said: list[str]) -> dict[str, str]:
    """Return the options of `beeline serve up` by name; one without a value is empty."""
    words = [line[1:-1] for line in said if line.startswith("<")]
    assert words[:2] == ["serve", "up"]
    found: dict[str, str] = {}
    name = ""
    for word in words[2:]:
        if word.startswith("--"):
            name, word = word, ""
        found[name] = word
    return found


def test_it_serves_what_is_mounted_where_that_is_an_archive_else_what_was_built_in(
    run: Run, built: Path, mounted: Path
) -> None:
    (mounted / "notes.txt").touch()
    (mounted / "folder.mar").mkdir()
    said = run()
    assert said[:2] == [f"archives: {built}", "WORKERS=unset"]
    expected = {"--server": "torchserve", "--store": str(built), "--listed": "", "--gateway": "nginx"}
    assert options(said) == {**expected, "--show-logs": "all"}
    (mounted / "a.mar").touch()
    (mounted / "b c.mar").touch()
    assert options(run())["--store"] == str(mounted)


def test_a_store_that_is_empty_or_cannot_be_read_is_one_sentence(run: Run, built: Path, mounted: Path) -> None:
    for empty in (built / "a.mar").unlink, mounted.rmdir:
        empty()
        with pytest.raises(subprocess.CalledProcessError) as caught:
            run()
        said = caught.value.stderr
        assert ("no archive: mount a folder" if mounted.exists() else "cannot be read by uid") in said
        assert caught.value.stdout == ""


def test_arguments_and_variables_reach_the_command(run: Run) -> None:
    said = run("--name", "two words", BEELINE_SERVER="mms", BEELINE_SHOW_LOGS="worker,server")
    found = options(said)
    assert (found["--server"], found["--show-logs"], found["--name"]) == ("mms", "worker,server", "two words")
    # The last of two wins, so an argument changes the image's option.
    assert options(run("--gateway", "none"))["--gateway"] == "none"


def test_after_the_word_serve_it_keeps_sagemakers_contract(run: Run, built: Path, mounted: Path) -> None:
    (mounted / "a.mar").touch()
    found = options(run("serve", "--name", "a"))
    assert (found["--sagemaker"], found["--store"], found["--name"]) == ("/opt/ml/model", str(built), "a")
    # The index of a store is not in model.tar.gz.
    assert "--listed" not in found


def test_a_first_word_that_is_a_command_is_run_instead(run: Run) -> None:
    assert run("beeline", "archive", "verify", "a b") == ["WORKERS=unset", "<archive>", "<verify>", "<a b>"]
    assert run("sh", "-c", "echo 'in a shell'") == ["in a shell"]


@pytest.mark.parametrize(
    ("gpus", "environ", "workers"),
    [
        (None, {}, "unset"),
        ("echo 'GPU 0: A'; echo 'GPU 1: B'", {}, "2"),
        ("echo 'GPU 0: A'; echo 'GPU 1: B'", {"WORKERS": ""}, "2"),
        ("echo 'GPU 0: A'; echo 'GPU 1: B'", {"WORKERS": "5"}, "5"),
        # A driver without a card, or one that fails, means a CPU machine.
        ("echo 'No devices found'", {}, "unset"),
        ("echo 'No devices found'", {"WORKERS": ""}, ""),
        ("echo 'it failed'; exit 9", {"WORKERS": ""}, ""),
    ],
)
def test_with_gpus_there_is_one_worker_each(run: Run, gpus: str | None, environ: dict[str, str], workers: str) -> None:
    assert run(gpus=gpus, **environ)[1] == f"WORKERS={workers}"


def healthy(port: int) -> bool:
    return subprocess.run([DOCKER / "healthcheck", str(port)], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(("status", "health"), [(200, True), (503, False), (404, False), (204, False)])
def test_healthy_is_what_ping_says(status: int, health: bool) -> None:
    class Ping(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/ping" else 500)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Ping) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        assert healthy(server.server_port) is health
        server.shutdown()


def test_nobody_there_or_nothing_said_is_not_healthy() -> None:
    with create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert not healthy(port)
    assert not healthy(port)
    assert os.access(DOCKER / "healthcheck", os.X_OK)


def of_image(dockerfile: Path, name: str) -> int:
    """Return a number of seconds that an image has in its environment."""
    (found,) = re.findall(rf"BEELINE_{name}_SECONDS=(\d+)", dockerfile.read_text())
    return int(found)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_gives_a_request_its_whole_deadline(dockerfile: Path) -> None:
    (deadline,) = re.findall(r"^beeline_deadline_seconds=(\d+)", (ROOT / "config/config.properties").read_text(), re.M)
    assert of_image(dockerfile, "STOP") >= int(deadline)
    assert 0 < of_image(dockerfile, "DRAIN") <= LONGEST_DRAIN


def graces() -> dict[str, int]:
    """Return every grace period in a file or a documented command."""
    found = {
        f"{file} {name}": int(service["stop_grace_period"].removesuffix("s"))
        for file in FILES
        for name, service in yaml.safe_load((ROOT / file).read_text())["services"].items()
        if service["image"].startswith("${BEELINE") and name != "archive"
    }
    for name in ("docs/containers.md", "docker/README.md"):
        for text in re.findall(r"(?:--stop-timeout|docker stop --time) (\d+)", (ROOT / name).read_text()):
            found[name] = int(text)
    return {**found, "the tests": int(GRACE)}


def test_no_container_is_killed_before_that() -> None:
    longest = max(of_image(each, "STOP") for each in DOCKERFILES)
    assert {where: grace for where, grace in graces().items() if grace <= LONGEST_DRAIN + longest + FORCE} == {}
    assert {where.split()[0] for where in graces()} == {*FILES, "docs/containers.md", "docker/README.md", "the"}
