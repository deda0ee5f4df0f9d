"""See bench/sweep.py."""

from bench.sweep import STAGES

__all__ = ["STAGES"]
