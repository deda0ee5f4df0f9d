"""A peer's own environment, made from its lock file the first time and whenever that changes."""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from beeline.errors import Undetermined
from host import ROOT
from serve.servers.protocol import Say

PEERS = ROOT / "bench" / "peers"
HOME = ROOT / ".beeline" / "peers"
# What the lock files are resolved for.
_PYTHON = (3, 11)
_SHOWN = 400


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
        return self.folder / "bin" / "python"

    def prepare(self, say: Say) -> Path:
        """Return its Python, installing first where the lock file is new or has changed.

        Raises:
            Undetermined: when it cannot be made, with the installer's own words.
        """
        try:
            wanted = hashlib.sha256(self.lock_file.read_bytes()).hexdigest()
        except OSError as error:
            raise Undetermined(f"{self.lock_file} cannot be read ({error.strerror}); restore it") from error
        self.folder.mkdir(parents=True, exist_ok=True)
        stamp = self.folder / "installed"
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not stamp.is_file() or stamp.read_text() != wanted or not self.python.exists():
                say(f"{self.name}: installing its environment (once, some minutes without a warm cache) ...")
                stamp.unlink(missing_ok=True)
                for arguments in self.commands():
                    _uv(self.name, arguments)
                stamp.write_text(wanted)
        return self.python

    def pinned(self) -> dict[str, str]:
        """Return the versions that `requirements.in` asks for, by package."""
        lines = self.lock_file.with_suffix(".in").read_text(encoding="utf-8").splitlines()
        pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
        return {name.partition("[")[0].strip(): version.strip() for name, version in pairs}

    def commands(self) -> list[list[str]]:
        """Return what uv is asked: the environment, then exactly what the lock file says."""
        version = sys.executable if sys.version_info[:2] == _PYTHON else ".".join(map(str, _PYTHON))
        return [
            ["venv", "--quiet", "--allow-existing", "--python", version, str(self.folder)],
            [
                *("pip", "sync", "--quiet", "--python", str(self.python)),
                *("--require-hashes", "--compile-bytecode", str(self.lock_file)),
            ],
        ]


def _uv(name: str, arguments: list[str]) -> None:
    uv = Path(sys.executable).with_name("uv")
    try:
        subprocess.run([str(uv), *arguments], check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise Undetermined(f"{uv} is missing; run `make setup`, which installs it") from error
    except subprocess.CalledProcessError as error:
        said = " ".join(error.stderr.split())[-_SHOWN:]
        raise Undetermined(f"the environment of {name} cannot be made ({said}); see its requirements.txt") from error
