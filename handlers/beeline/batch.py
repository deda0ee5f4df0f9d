"""A batch of requests: the good rows are stacked, and answers go back to their positions.

Only this file keeps positions, so that no broken picture can shift its neighbours' answers.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from beeline.errors import RequestError

Pixels = NDArray[np.uint8]

# A picture this large leaves holes in the heap that glibc keeps (271 MB after a dozen of 50 megapixels). To return them
# takes milliseconds, and such a decode tenths of a second. Only glibc has this function.
_LARGE_PIXELS = 2_000_000
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
T = TypeVar("T")


@dataclass(frozen=True)
class Ok:
    """One decoded picture, `[crop, crop, 3]` uint8, and the `prompt` and `max_tokens` that its request carries."""

    pixels: Pixels
    prompt: str = ""
    max_tokens: int | None = None


@dataclass(frozen=True)
class Failed:
    """One request that failed, with its error."""

    error: RequestError


@dataclass(frozen=True)
class Batch:
    """One row a request, in the server's order; `good` are the positions of the decoded ones.

    `accepts` are the clients' `Accept` headers, one a request, or none at all. `ends` are the requests' deadlines by
    `time.time`, None of one that has none.
    """

    rows: tuple[Ok | Failed, ...]
    accepts: tuple[str | None, ...] = ()
    ends: tuple[float | None, ...] = ()
    good: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "good", tuple(i for i, row in enumerate(self.rows) if isinstance(row, Ok)))

    def __len__(self) -> int:
        return len(self.rows)

    def accept(self, index: int) -> str | None:
        """Return the `Accept` header of request `index`."""
        return self.accepts[index] if self.accepts else None

    def end(self, index: int) -> float | None:
        """Return the deadline of request `index`."""
        return self.ends[index] if self.ends else None

    def stack(self) -> Pixels:
        """Return the good rows as one contiguous uint8 array `[len(good), crop, crop, 3]`."""
        pictures = [row.pixels for row in self.rows if isinstance(row, Ok)]
        return np.stack(pictures) if pictures else np.empty((0, 0, 0, 3), np.uint8)

    def scatter(self, results: Sequence[T], failed: Callable[[Failed], T]) -> list[T]:
        """Return one result a request: `results`, one for each good row, and `failed(row)` at the other positions."""
        if len(results) != len(self.good):
            raise ValueError(f"{len(results)} results for {len(self.good)} decoded pictures; return one each, in order")
        by_position = dict(zip(self.good, results, strict=True))
        return [failed(row) if isinstance(row, Failed) else by_position[i] for i, row in enumerate(self.rows)]


class PixelBudget:
    """How many pixels may be decoded at the same time: the bound on the worker's peak memory.

    A single picture may take the whole budget, so that a picture within the limit is always decoded.
    """

    def __init__(self, limit: int) -> None:
        self.limit = self._free = limit
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Wait until `pixels` are free, and hold them for the block."""
        pixels = min(pixels, self.limit)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            if pixels >= _LARGE_PIXELS and _malloc_trim is not None:
                _malloc_trim(0)
            with self._changed:
                self._free += pixels
                self._changed.notify_all()
