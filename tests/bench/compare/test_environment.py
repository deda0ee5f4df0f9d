"""The peers' environments: pinned, hashed, made once."""

import re
import sys
from pathlib import Path

import pytest

from beeline.errors import Undetermined
from bench.compare.environment import PEERS, Environment
from host import ROOT

NAMES = sorted(path.parent.name for path in PEERS.glob("*/requirements.in"))


def test_every_peer_of_the_comparison_is_there() -> None:
    assert NAMES == ["bentoml", "fastapi", "flask", "litserve", "mosec", "pytriton", "ray", "torchserve"]


@pytest.mark.parametrize("name", NAMES)
def test_a_peers_lock_file_has_hashes_versions_and_no_address(name: str) -> None:
    environment = Environment(name)
    text = environment.lock_file.read_text(encoding="utf-8")
    assert "://" not in text
    assert "index-url" not in text
    lines = [line for line in text.splitlines() if re.match(r"[A-Za-z]", line)]
    assert lines
    assert all("==" in line for line in lines)
    assert text.count("--hash=sha256:") >= len(lines)
    for package, version in environment.pinned().items():
        assert any(line.startswith(f"{package}=={version}") for line in (each.split(" ")[0] for each in lines)), package


@pytest.mark.parametrize("name", NAMES)
def test_what_a_peers_requirements_name_is_pinned(name: str) -> None:
    pinned = Environment(name).pinned()
    assert pinned["torch"] == "2.13.0"
    assert pinned["torchvision"] == "0.28.0"
    assert len(pinned) >= 3


def test_environments_lie_where_git_does_not_look() -> None:
    environment = Environment("litserve")
    assert environment.folder == ROOT / ".beeline" / "peers" / "litserve"
    assert environment.python == environment.folder / "bin" / "python"


def test_an_environment_is_made_of_its_lock_file_with_the_python_that_is_resolved_for(tmp_path: Path) -> None:
    (tmp_path / "peers" / "empty").mkdir(parents=True)
    peer = Environment("empty", home=tmp_path / "home", peers=tmp_path / "peers")
    peer.lock_file.write_text("# nothing\n")
    assert peer.installed.version in (sys.executable, "3.11")
    assert peer.prepare(print) == tmp_path / "home" / "empty" / "bin" / "python"
    assert peer.python.exists()
    peer.lock_file.write_text("not a requirement at all\n")
    with pytest.raises(Undetermined, match=r"the environment of empty cannot be installed from .*requirements.txt"):
        peer.prepare(print)
