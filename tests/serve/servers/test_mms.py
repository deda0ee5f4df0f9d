"""Multi Model Server's own environment: made once from its lock file, or named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from beeline.errors import Undetermined
from serve.servers.mms import Mms


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Record uv's commands instead of running them; `venv` makes its folders."""
    recorded: list[list[str]] = []
    monkeypatch.delenv("BEELINE_MMS_PYTHON", raising=False)

    def run(command: list[str], **options: object) -> None:
        recorded.append(command[1:])
        if command[1] == "venv":
            environment(Path(command[-1]))

    monkeypatch.setattr(subprocess, "run", run)
    return recorded


def environment(folder: Path) -> Path:
    """Make the folders of an environment with the server; return its Python."""
    (folder / "lib" / "python3.11" / "site-packages" / "mms").mkdir(parents=True)
    (folder / "bin").mkdir()
    (folder / "bin" / "python").touch()
    return folder / "bin" / "python"


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


def test_a_named_python_is_used_and_nothing_is_installed(
    tmp_path: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    python = environment(tmp_path / "mms")
    monkeypatch.setenv("BEELINE_MMS_PYTHON", str(python))
    server = Mms(tmp_path / "venv", tmp_path / "no lock file")
    assert server.prepare(print) == python
    assert server.site(python) == tmp_path / "mms" / "lib" / "python3.11" / "site-packages"
    assert server.environment(python)["PATH"].startswith(f"{python.parent}:")
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
    # The folder is not Beeline's.
    assert "remove" not in str(caught.value)
    assert calls == []
