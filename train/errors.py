"""Errors of pictures, downloads, weights and runs."""

from __future__ import annotations

from beeline.errors import BeelineError


class DataError(BeelineError):
    """A picture folder that cannot be trained on: missing, one class only, an empty class, a broken picture."""


class DownloadError(BeelineError):
    """A download that started and failed: cut off, too large, unsafe to unpack, or not the expected content."""


class Unavailable(DownloadError):
    """A download that never started (no network, no such file): the next source of data may be tried."""


class WeightsError(BeelineError):
    """A file of starting weights that cannot be read or belongs to another architecture."""


class RunError(BeelineError):
    """A training run that is missing, unfinished or damaged."""
