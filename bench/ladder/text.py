"""See bench/sweep.py."""

from bench.sweep import notes, number, titles

__all__ = ["notes", "number", "titles"]
