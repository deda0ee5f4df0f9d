"""What a ladder measures: an archive, pictures, batch sizes, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from beeline.errors import ConfigError

if TYPE_CHECKING:
    from bench.pictures import Pictures


@dataclass(frozen=True)
class Plan:
    """One ladder.

    `device` and `threads` are what a worker would get by `BEELINE_DEVICE` and `BEELINE_THREADS`. The batch
    sizes double from 1 until a plateau, but at least to `least` and at most to `most`. Each sample goes
    through the same `mix` pictures, so that rows differ by their batch size alone; a row takes `repeats`
    samples of each stage, or as many (three at least) as fit into `seconds`. `memory_mb` limits the worker
    on the CPU, None to nine tenths of what is free: a batch too large is then a row, and not the kernel
    ending some process. `patience` is how long, in seconds, one row may take before it counts as hung.
    """

    archive: Path
    pictures: Pictures
    device: str = "auto"
    threads: int = 1
    least: int = 1
    most: int = 256
    repeats: int = 7
    seconds: float = 20.0
    mix: int = 16
    memory_mb: int | None = None
    patience: float = 600.0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: naming the first impossible one.
        """
        for name in ("threads", "least", "most", "repeats", "mix"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; allowed: 1 or more")
        if self.least > self.most:
            raise ConfigError(f"least is {self.least} and most {self.most}; allowed: least up to most")
        if self.memory_mb is not None and self.memory_mb < 1:
            raise ConfigError(f"memory is {self.memory_mb} MB; allowed: 1 or more")

    def bodies(self) -> list[bytes]:
        """Return the mix: `mix` pictures, evenly from all of them, or fewer ones again and again."""
        found = self.pictures.bodies
        if len(found) <= self.mix:
            return [found[i % len(found)] for i in range(self.mix)]
        return [found[i * len(found) // self.mix] for i in range(self.mix)]
