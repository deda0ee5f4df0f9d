"""What is tuned: batch size, workers, maximum batch delay and threads of a worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

_KEYS = ("batch_size", "workers", "max_batch_delay", "threads")


@dataclass(frozen=True, order=True)
class Settings:
    """One way to serve a model: requests a batch at most, processes, milliseconds, threads of each process."""

    batch_size: int
    workers: int
    max_batch_delay: int
    threads: int

    def __str__(self) -> str:
        """Return it for people."""
        return (
            f"batch {self.batch_size}, {counted(self.workers, 'worker')}, delay {self.max_batch_delay} ms, "
            f"{counted(self.threads, 'thread')} each"
        )

    @property
    def label(self) -> str:
        """A name of letters, digits and dashes."""
        return f"b{self.batch_size}-w{self.workers}-d{self.max_batch_delay}-t{self.threads}"

    def to_dict(self) -> dict[str, int]:
        """Return JSON values."""
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """Return the settings among a row's values."""
        return cls(**{key: int(values[key]) for key in _KEYS})


def counted(number: int, noun: str) -> str:
    """Return `1 worker` or `2 workers`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
