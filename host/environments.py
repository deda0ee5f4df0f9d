"""Environments that uv makes from a lock file with hashes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from beeline.errors import Undetermined
from host.files import locked, sha256


@dataclass(frozen=True)
class Environment:
    """A folder with a Python and exactly the packages of a lock file."""

    title: str  # of its content, for messages
    folder: Path
    lock_file: Path
    version: str = sys.executable  # of Python: a path, or a version such as `3.11`

    @property
    def python(self) -> Path:
        """The path of its interpreter."""
        return self.folder / "bin" / "python"

    def prepare(self, say: Callable[[str], None]) -> Path:
        """Return its Python; install first where the lock file is new or has changed, one process at a time."""
        try:
            digest = sha256(self.lock_file)
        except OSError as error:
            raise Undetermined(f"{self.lock_file} cannot be read ({error.strerror}); restore it") from error
        self.folder.mkdir(parents=True, exist_ok=True)
        stamp = self.folder / "installed"
        with locked(self.folder / "lock"):
            if not stamp.is_file() or stamp.read_text() != digest or not self.python.exists():
                say(f"installing {self.title} into {self.folder} (once, some minutes without a warm cache) ...")
                # An interrupted installation starts again.
                stamp.unlink(missing_ok=True)
                for command in self.commands():
                    self._uv(command)
                stamp.write_text(digest)
        return self.python

    def commands(self) -> list[list[str]]:
        """Return uv's commands: make the environment, then install exactly the packages of the lock file."""
        install = ["pip", "sync", "--quiet", "--require-hashes", "--compile-bytecode", "--python", str(self.python)]
        return [
            ["venv", "--quiet", "--allow-existing", "--python", self.version, str(self.folder)],
            [*install, str(self.lock_file)],
        ]

    def _uv(self, arguments: list[str]) -> None:
        # The neighbour of this Python first.
        uv = shutil.which("uv", path=Path(sys.executable).parent) or shutil.which("uv")
        if uv is None:
            raise Undetermined(f"uv, which installs {self.title}, was not found; run `make setup`")
        try:
            subprocess.run([uv, *arguments], capture_output=True, text=True, check=True)
        except OSError as error:
            raise Undetermined(f"{uv} cannot be run ({error.strerror}); run `make setup`") from error
        except subprocess.CalledProcessError as error:
            words = " ".join(error.stderr.split())[-400:] or "no message"
            message = f"{self.title} cannot be installed from {self.lock_file} (uv: {words}); is the network there?"
            raise Undetermined(message) from error
