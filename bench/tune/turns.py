"""Turns of measuring, appended to a file as they end, so that an interrupted tuning goes on from there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from beeline.errors import BeelineError, ConfigError
from bench.tune.settings import Settings

_SCHEMA = 1


@dataclass(frozen=True)
class Turn:
    """One measured load on one configuration.

    Attributes:
        settings: what was measured.
        round: turns of the same round were close to each other in time.
        seconds: how long was measured.
        per_second: answers of 200 a second; in few seconds a batch of each worker more or less.
        p95_ms: of those, in milliseconds; None where there was none.
        failed: requests that were not answered 200.
        growing: open loop: whether ever more requests waited.
        batch: the mean of the batch sizes seen; None where no answer told.
    """

    settings: Settings
    round: int
    seconds: float
    per_second: float
    p95_ms: float | None
    failed: int
    growing: bool = False
    batch: float | None = None

    @classmethod
    def of(cls, settings: Settings, number: int, summary: Mapping[str, Any]) -> Turn:
        """Return the turn that a load's summary tells of."""
        sizes = {int(size): count for size, count in summary["batch_sizes"].items()}
        # Each request of a batch of n tells n: the mean over batches, not over requests.
        batches = sum(count / size for size, count in sizes.items())
        return cls(
            settings,
            number,
            summary["seconds"],
            summary["good_per_second"],
            summary["p95_ms"],
            summary["failed"],
            bool(summary["backlog"] and summary["backlog"]["growing"]),
            round(sum(sizes.values()) / batches, 2) if batches else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, the settings among them."""
        values = asdict(self)
        return {**values.pop("settings"), **values}

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Turn:
        """Return what `to_dict` made."""
        rest = {key: values[key] for key in ("round", "seconds", "per_second", "p95_ms", "failed", "growing", "batch")}
        return cls(Settings.of(values), **rest)

    def __str__(self) -> str:
        """Return it for people."""
        p95 = "no answer" if self.p95_ms is None else f"p95 {self.p95_ms:.0f} ms"
        failed = f", {self.failed} failed" if self.failed else ""
        growing = ", ever more wait" if self.growing else ""
        return f"{self.settings}: {self.per_second:.1f}/s, {p95}{failed}{growing} ({self.seconds:.1f} s)"


@dataclass(frozen=True)
class Round:
    """What a round is to measure; `stage` counts how far the race is."""

    number: int
    stage: int
    wanted: tuple[Settings, ...]


@dataclass
class Journal:
    """A file of JSON lines: what is tuned first, then the ladder's points and the turns, each as it ends.

    Attributes:
        path: the file.
        turns: those in the file.
        rounds: what was to be measured.
        points: the ladder's; threads, batch size, milliseconds of a batch.
        notes: other lines by name, the last of each.
    """

    path: Path
    turns: list[Turn] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    points: list[tuple[int, int, float]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(cls, path: Path, about: Mapping[str, Any]) -> Journal:
        """Make a new file for what `about` says is tuned; one of that name is replaced."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")
        journal = cls(path)
        journal._append({"schema": _SCHEMA, "about": dict(about)})
        return journal

    @classmethod
    def resume(cls, path: Path, about: Mapping[str, Any]) -> Journal:
        """Read a file and go on in it.

        Raises:
            ConfigError: where it is missing, is none of ours, or is about something else.
        """
        if not path.is_file():
            raise ConfigError(f"--resume is {path}, which is not there; name the file that an interrupted run told")
        lines = _lines(path)
        first = lines[0] if lines else {}
        if first.get("schema") != _SCHEMA or not isinstance(first.get("about"), dict):
            raise ConfigError(f"--resume is {path}, which no run of this kind wrote; name the file that one told")
        for key, value in about.items():
            if first["about"].get(key) != value:
                raise ConfigError(
                    f"--resume is {path}, whose {key} is {first['about'].get(key)!r} and not {value!r}; "
                    "give the same options again, or begin anew without --resume"
                )
        journal = cls(path)
        for line in lines[1:]:
            journal._take(line)
        # A line that broke off must not run into the next one.
        if not path.read_bytes().endswith(b"\n"):
            journal._write(b"\n")
        return journal

    def add(self, turn: Turn) -> None:
        """Keep a turn."""
        self._append({"turn": turn.to_dict()})
        self.turns.append(turn)

    def plan(self, planned: Round) -> None:
        """Keep what a round will measure."""
        wanted = [settings.to_dict() for settings in planned.wanted]
        self._append({"round": planned.number, "stage": planned.stage, "wanted": wanted})
        self.rounds.append(planned)

    def climb(self, threads: int, batch: int, milliseconds: float) -> None:
        """Keep a point of the ladder."""
        self._append({"point": [threads, batch, milliseconds]})
        self.points.append((threads, batch, milliseconds))

    def note(self, name: str, value: Any) -> None:
        """Keep something else under a name."""
        self._append({"note": name, "value": value})
        self.notes[name] = value

    def _take(self, line: dict[str, Any]) -> None:
        if "turn" in line:
            self.turns.append(Turn.read(line["turn"]))
        elif "round" in line:
            wanted = tuple(Settings.of(values) for values in line["wanted"])
            self.rounds.append(Round(line["round"], line["stage"], wanted))
        elif "point" in line:
            threads, batch, milliseconds = line["point"]
            self.points.append((int(threads), int(batch), float(milliseconds)))
        elif "note" in line:
            self.notes[line["note"]] = line["value"]

    def _append(self, values: dict[str, Any]) -> None:
        self._write(json.dumps(values, allow_nan=False).encode() + b"\n")

    def _write(self, data: bytes) -> None:
        """Append in one call, which no signal's exception divides."""
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                os.write(descriptor, data)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise BeelineError(
                f"{self.path} cannot be written ({error.strerror}); make room or rights there"
            ) from error


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines that are whole; the last one may have broken off."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict):
            found.append(values)
    return found
