"""Multi Model Server's own environment: made from the lock file, once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from beeline.errors import Undetermined
from serve.servers.mms import Mms


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Record what would be run instead of running it; `venv` makes the folders that uv would."""
    recorded: list[list[str]] = []
    monkeypatch.delenv("BEELINE_MMS_PYTHON", raising=False)

    def run(command: list[str], **options: object) -> None:
        recorded.append(command[1:])
        if command[1] == "venv":
            python = Path(command[-1]) / "bin" / "python"
            python.parent.mkdir()
            python.touch()
            (Path(command[-1]) / "lib" / "python3.11" / "site-packages" / "mms").mkdir(parents=True)

    monkeypatch.setattr(subprocess, "run", run)
    return recorded


def test_it_is_installed_once_with_hashes_and_bytecode(tmp_path: Path, calls: list[list[str]]) -> None:
    lock_file, said = tmp_path / "mms.txt", list[str]()
    lock_file.write_text("one")
    server = Mms(tmp_path / "venv", lock_file)
    assert server.prepare(said.append) == tmp_path / "venv" / "bin" / "python"
    assert [call[0] for call in calls] == ["venv", "pip"]
    assert {"--require-hashes", "--compile-bytecode", str(lock_file)} <= set(calls[1])
    assert len(said) == 1
    assert "installing Multi Model Server" in said[0]
    server.prepare(said.append)
    assert len(calls) == 2


def test_its_python_is_first_on_the_path(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    assert Mms(tmp_path).environment(python)["PATH"].startswith(f"{tmp_path / 'bin'}:")


def test_a_python_that_is_named_is_taken_and_nothing_installed(
    tmp_path: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "mms" / "bin" / "python"
    (tmp_path / "mms" / "lib" / "python3.11" / "site-packages" / "mms").mkdir(parents=True)
    python.parent.mkdir()
    python.touch()
    monkeypatch.setenv("BEELINE_MMS_PYTHON", str(python))
    server = Mms(tmp_path / "venv", tmp_path / "no lock file")
    assert server.prepare(print) == python
    assert server.site(python) == tmp_path / "mms" / "lib" / "python3.11" / "site-packages"
    assert calls == []
    assert not server.venv.exists()


@pytest.mark.parametrize("given", ["python3", "bin/python", "/nowhere/bin/python", sys.executable, "/"])
def test_a_python_without_the_server_is_one_sentence(
    tmp_path: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("BEELINE_MMS_PYTHON", given)
    with pytest.raises(Undetermined) as caught:
        Mms(tmp_path / "venv", tmp_path / "mms.txt").prepare(print)
    assert str(caught.value).startswith(f"BEELINE_MMS_PYTHON is {given!r}, which is no Python with multi-model-server")
    # That folder is somebody's, and not ours to have removed.
    assert "remove" not in str(caught.value)
    assert calls == []
