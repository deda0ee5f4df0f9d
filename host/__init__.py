"""This machine: files, zips, processes, signals, cores and environments, each in one place."""

from pathlib import Path

# The project's folder. Nothing here depends on the working directory.
ROOT = Path(__file__).resolve().parents[1]
