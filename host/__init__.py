"""This machine: files, zips, processes, signals, cores and environments, each in one place."""

from pathlib import Path

# Where this project lies; nothing here asks for the working folder.
ROOT = Path(__file__).resolve().parents[1]
