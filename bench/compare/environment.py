"""A peer's own environment, made from its lock file the first time and whenever that changes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from host import ROOT, environments
from serve.servers.protocol import Say

PEERS = ROOT / "bench" / "peers"
HOME = ROOT / ".beeline" / "peers"
# What the lock files are resolved for.
_PYTHON = (3, 11)


@dataclass(frozen=True)
class Environment:
    """One peer's environment: `home/name`, holding what `lock_file` says."""

    name: str
    home: Path = HOME
    peers: Path = PEERS

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.home / self.name

    @property
    def lock_file(self) -> Path:
        """The packages with versions and hashes."""
        return self.peers / self.name / "requirements.txt"

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.installed.python

    @property
    def installed(self) -> environments.Environment:
        """What is made of the lock file."""
        version = sys.executable if sys.version_info[:2] == _PYTHON else ".".join(map(str, _PYTHON))
        return environments.Environment(f"the environment of {self.name}", self.folder, self.lock_file, version)

    def prepare(self, say: Say) -> Path:
        """Return its Python, installing first where the lock file is new or has changed.

        Raises:
            Undetermined: when it cannot be made, with the installer's own words.
        """
        return self.installed.prepare(say)

    def pinned(self) -> dict[str, str]:
        """Return the versions that `requirements.in` asks for, by package."""
        lines = self.lock_file.with_suffix(".in").read_text(encoding="utf-8").splitlines()
        pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
        return {name.partition("[")[0].strip(): version.strip() for name, version in pairs}
