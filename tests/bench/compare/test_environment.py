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


def test_uv_is_asked_for_exactly_the_lock_file(tmp_path: Path) -> None:
    environment = Environment("mosec", home=tmp_path)
    make, sync = environment.commands()
    assert make[0] == "venv"
    assert make[-1] == str(tmp_path / "mosec")
    assert sync[:2] == ["pip", "sync"]
    assert {"--require-hashes", "--compile-bytecode", str(environment.lock_file)} <= set(sync)
    assert make[make.index("--python") + 1] in (sys.executable, "3.11")


def empty_peer(tmp_path: Path, lock: str) -> Environment:
    (tmp_path / "peers" / "empty").mkdir(parents=True)
    (tmp_path / "peers" / "empty" / "requirements.txt").write_text(lock)
    return Environment("empty", home=tmp_path / "home", peers=tmp_path / "peers")


def test_an_environment_is_made_once_and_again_when_its_lock_file_changes(tmp_path: Path) -> None:
    environment = empty_peer(tmp_path, "# nothing\n")
    said: list[str] = []
    assert environment.prepare(said.append).exists()
    environment.prepare(said.append)
    assert len(said) == 1
    environment.lock_file.write_text("# nothing else\n")
    environment.prepare(said.append)
    assert len(said) == 2


def test_an_environment_that_cannot_be_made_says_so_and_is_tried_again(tmp_path: Path) -> None:
    environment = empty_peer(tmp_path, "not a requirement at all\n")
    for _ in range(2):
        with pytest.raises(Undetermined, match="the environment of empty cannot be made"):
            environment.prepare(print)


def test_a_missing_lock_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(Undetermined, match="restore it"):
        Environment("nobody", home=tmp_path, peers=tmp_path).prepare(print)
