"""Multi Model Server's own environment: made from its lock file, or named."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from beeline.errors import Undetermined
from host.environments import Environment
from serve.servers.mms import Mms


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The Python of a fake environment with the server."""
    (tmp_path / "mms" / "lib" / "python3.11" / "site-packages" / "mms").mkdir(parents=True)
    python = tmp_path / "mms" / "bin" / "python"
    python.parent.mkdir()
    python.touch()
    return python


def test_without_a_named_python_its_environment_is_prepared(
    tmp_path: Path, python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tests/host/test_environments.py shows how."""
    prepared: list[Environment] = []

    def prepare(environment: Environment, say: object) -> Path:
        prepared.append(environment)
        return environment.python

    monkeypatch.delenv("BEELINE_MMS_PYTHON", raising=False)
    monkeypatch.setattr(Environment, "prepare", prepare)
    assert Mms(tmp_path / "mms", tmp_path / "mms.txt").install(print) == python
    assert prepared == [Environment("Multi Model Server", tmp_path / "mms", tmp_path / "mms.txt")]


def test_a_named_python_is_used_and_nothing_is_installed(
    tmp_path: Path, python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEELINE_MMS_PYTHON", str(python))
    server = Mms(tmp_path / "venv", tmp_path / "no lock file")
    assert server.install(print) == python
    assert server.site(python) == tmp_path / "mms" / "lib" / "python3.11" / "site-packages"
    assert server.environment(python)["PATH"].startswith(f"{python.parent}:")
    assert not server.venv.exists()


@pytest.mark.parametrize("given", ["python3", "bin/python", "/nowhere/bin/python", sys.executable, "/"])
def test_a_python_without_the_server_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("BEELINE_MMS_PYTHON", given)
    with pytest.raises(Undetermined) as caught:
        Mms(tmp_path / "venv", tmp_path / "mms.txt").install(print)
    assert str(caught.value).startswith(f"BEELINE_MMS_PYTHON is {given!r}, which is no Python with multi-model-server")
    # The folder is not Beeline's.
    assert "remove" not in str(caught.value)
