"""uv makes an environment from its lock file, once, and again when the file changes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from beeline.errors import Undetermined
from host.environments import Environment


def environment(tmp_path: Path, lock: str = "# nothing\n") -> Environment:
    (tmp_path / "lock.txt").write_text(lock)
    return Environment("the server", tmp_path / "home" / "server", tmp_path / "lock.txt")


def test_it_is_made_once_and_again_when_its_lock_file_changes_or_it_is_gone(tmp_path: Path) -> None:
    made, said = environment(tmp_path), list[str]()
    assert made.prepare(said.append) == tmp_path / "home" / "server" / "bin" / "python"
    made.prepare(said.append)
    assert len(said) == 1
    assert said[0].startswith(f"installing the server into {made.folder}")
    prefix = subprocess.check_output([made.python, "-c", "import sys; print(sys.prefix)"], text=True)
    assert Path(prefix.strip()) == made.folder
    made.lock_file.write_text("# nothing else\n")
    made.prepare(said.append)
    assert len(said) == 2
    made.python.unlink()
    assert made.prepare(said.append).exists()
    assert len(said) == 3


def test_uv_is_asked_for_exactly_the_lock_file_with_hashes_and_bytecode(tmp_path: Path) -> None:
    made = environment(tmp_path)
    make, sync = made.commands()
    assert make[0] == "venv"
    assert make[-1] == str(made.folder)
    assert make[make.index("--python") + 1] == sys.executable
    # `sync` removes the packages of an older lock file, and installs no dependency that the file lacks.
    assert sync[:2] == ["pip", "sync"]
    assert {"--require-hashes", "--compile-bytecode", str(made.lock_file), str(made.python)} <= set(sync)


@pytest.mark.parametrize("lock", ["not a requirement at all\n", "six==1.17.0\n"], ids=["malformed", "without a hash"])
def test_an_installation_that_fails_is_one_sentence_and_tried_again(tmp_path: Path, lock: str) -> None:
    made, said = environment(tmp_path), list[str]()
    made.prepare(said.append)
    made.lock_file.write_text(lock)
    for _ in range(2):
        with pytest.raises(Undetermined, match=r"^the server cannot be installed from \S+/lock.txt \(uv: .+\); is "):
            made.prepare(said.append)
    # Also with the first file: half of the environment may belong to the other one.
    made.lock_file.write_text("# nothing\n")
    made.prepare(said.append)
    assert len(said) == 4


def test_a_missing_lock_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(Undetermined, match=r"none.txt cannot be read \(No such file or directory\); restore it"):
        Environment("the server", tmp_path / "home", tmp_path / "none.txt").prepare(print)


def test_without_uv_the_fix_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = environment(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Undetermined, match="uv, which installs the server, was not found; run `make setup`"):
        made.prepare(print)
    (tmp_path / "uv").write_text("no program")
    (tmp_path / "uv").chmod(0o755)
    with pytest.raises(Undetermined, match=r"uv cannot be run \(Exec format error\); run `make setup`"):
        made.prepare(print)
