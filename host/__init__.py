"""This machine: files, zips, processes, signals, cores and environments, each in one place."""

from collections.abc import Callable
from pathlib import Path

# The project's folder. Nothing here depends on the working directory.
ROOT = Path(__file__).resolve().parents[1]
# What gets lines of progress for people.
Say = Callable[[str], None]


def silent(line: str) -> None:
    """Ignore a line of progress."""
