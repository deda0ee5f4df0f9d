"""The time that a container has to end, in every file that names it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.docker.conftest import GRACE

DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
FILES = ("docker-compose.yml", "awsei-docker-compose.yml", "deploy/swarm.yml")
# Seconds that the supervisor adds before it ends what is left by force.
FORCE = 2
LONGEST_DRAIN = 5


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
