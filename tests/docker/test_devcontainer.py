"""The dev container builds from the project's own Dockerfile; its form is checked, no engine builds it here."""

from __future__ import annotations

import json
import re
import subprocess

from tests.conftest import ROOT

FOLDER = ROOT / ".devcontainer"


def test_the_dev_container_builds_a_stage_of_our_dockerfile_from_the_whole_checkout() -> None:
    values = json.loads((FOLDER / "devcontainer.json").read_text())
    build = values["build"]
    dockerfile = (FOLDER / build["dockerfile"]).resolve()
    assert dockerfile == ROOT / "docker/cpu.Dockerfile"
    assert (FOLDER / build["context"]).resolve() == ROOT
    assert re.search(rf"^FROM \S+ AS {build['target']}$", dockerfile.read_text(), re.MULTILINE)
    assert values["forwardPorts"] == [8000, 8080]
    assert set(values["portsAttributes"]) == {str(port) for port in values["forwardPorts"]}


def test_its_environment_is_the_images() -> None:
    script = FOLDER / "environment"
    values = json.loads((FOLDER / "devcontainer.json").read_text())
    assert values["postCreateCommand"] == f"bash {script.relative_to(ROOT)}"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    venv = re.search(r"WORKDIR (\S+)", (ROOT / "docker/cpu.Dockerfile").read_text())
    assert venv is not None
    assert f"ln -sfn {venv[1]}/.venv .venv" in text
    assert all((ROOT / file).is_file() for file in re.findall(r"-r (\S+)", text))
