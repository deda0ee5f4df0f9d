"""The journal of a measurement that takes minutes: each figure is kept as it is measured, so that it can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beeline.errors import BeelineError, ConfigError
from host import ROOT
from host.files import write_whole

_SCHEMA = 2


def state_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return where journals are kept: `BEELINE_STATE`, else `.beeline`, and `bench` in it."""
    return Path(environ.get("BEELINE_STATE") or ROOT / ".beeline").resolve() / "bench"


@dataclass
class Journal:
    """A file of JSON lines to which each figure is added as it is measured, so that an interrupted job goes on.

    The first line says what is measured; each other one is a pair of a name and a JSON value, as in `rows`.
    """

    path: Path
    rows: list[tuple[str, Any]] = field(default_factory=list)

    @classmethod
    def begin(cls, path: Path, about: Mapping[str, Any]) -> Journal:
        """Make a new file for what `about` says is measured; one of that name is replaced."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"schema": _SCHEMA, "about": about}) + "\n", encoding="utf-8")
        return cls(path)

    @classmethod
    def resume(cls, path: Path, about: Mapping[str, Any]) -> Journal:
        """Read a file and go on in it; a last line that broke off is cut.

        Raises:
            ConfigError: where it is missing, no journal, or about something else.
        """
        if not path.is_file():
            raise ConfigError(f"--resume is {path}, which is not there; name the file that an interrupted run printed")
        whole = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")[0]
        try:
            first, *rows = map(json.loads, whole.splitlines())
            if first["schema"] != _SCHEMA:
                raise ValueError
            before = dict(first["about"])
            pairs = [(name, value) for name, value in rows]
        except (KeyError, TypeError, ValueError):
            raise ConfigError(f"--resume is {path}, which is no journal; name the file that a run printed") from None
        for key, value in json.loads(json.dumps(about)).items():
            if before.get(key) != value:
                raise ConfigError(
                    f"--resume is {path}, whose {key} is {before.get(key)!r} and not {value!r}; "
                    "give the same options again, or leave out --resume"
                )
        write_whole(path, whole + "\n")
        return cls(path, pairs)

    @classmethod
    def job(cls, path: Path, about: Mapping[str, Any]) -> Journal:
        """Go on with the file where it is about the same, else begin it."""
        try:
            return cls.resume(path, about)
        except ConfigError:
            return cls.begin(path, about)

    def add(self, name: str, value: Any) -> None:
        """Append a row, in one call, which no signal's exception divides."""
        line = json.dumps([name, value], allow_nan=False).encode() + b"\n"
        try:
            with self.path.open("ab", buffering=0) as file:
                file.write(line)
        except OSError as error:
            raise BeelineError(f"{self.path} cannot be written ({error.strerror}); make room there") from error
        self.rows.append((name, json.loads(line)[1]))

    def of(self, name: str) -> list[Any]:
        """Return the values of that name, oldest first."""
        return [value for each, value in self.rows if each == name]

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return the value of that name, which is measured only where the file does not have it."""
        if not self.of(name):
            self.add(name, measure())
        return self.of(name)[0]
