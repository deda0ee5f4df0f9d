"""Errors of pictures, downloads, weights and runs."""

from __future__ import annotations

from beeline.errors import BeelineError


class DataError(BeelineError):
    """A picture folder that cannot be trained on: missing, one class only, an empty class, a broken picture."""


class DownloadError(BeelineError):
    """A download that began and did not end well: broken off, too large, or with the wrong checksum."""


class Unavailable(DownloadError):
    """A download that never began (no network, no such file): the next source of data may be tried."""


class UnsafeArchive(DataError):
    """A zip file that would write outside its folder, holds links, or grows beyond its limit."""


class WeightsError(BeelineError):
    """A file of starting weights that cannot be read or belongs to another architecture."""


class RunError(BeelineError):
    """A training run that is missing, unfinished or damaged."""
