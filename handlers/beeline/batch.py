"""A batch of requests: rows become pictures, and answers go back to their positions.

Only `Batch` keeps positions, so that no broken picture can shift its neighbours' answers.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from beeline import pixels
from beeline.errors import ConfigError, RequestError
from beeline.payload import extract
from beeline.settings import Choice, Limits
from beeline.spec import Geometry

if TYPE_CHECKING:
    from beeline.cuda_jpeg import CudaJpegs

Pixels = NDArray[np.uint8]

# A picture this large leaves holes in the heap that glibc keeps (271 MB after a dozen of 50 megapixels). To return them
# takes milliseconds, and such a decode tenths of a second. Only glibc has this function.
_LARGE_PIXELS = 2_000_000
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
T = TypeVar("T")


@dataclass(frozen=True)
class Ok:
    """One decoded picture, `[crop, crop, 3]` uint8."""

    pixels: Pixels


@dataclass(frozen=True)
class Failed:
    """One request that failed, with its error."""

    error: RequestError


@dataclass(frozen=True)
class Batch:
    """One row a request, in the server's order; `good` are the positions of the decoded ones.

    `accepts` are the clients' `Accept` headers, one a request, or none at all.
    """

    rows: tuple[Ok | Failed, ...]
    accepts: tuple[str | None, ...] = ()
    good: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "good", tuple(i for i, row in enumerate(self.rows) if isinstance(row, Ok)))

    def __len__(self) -> int:
        return len(self.rows)

    def accept(self, index: int) -> str | None:
        """Return the `Accept` header of request `index`."""
        return self.accepts[index] if self.accepts else None

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


class Decoder:
    """Turns rows, as the server passes them, into pictures: each by itself, or JPEGs together on a CUDA device."""

    def __init__(self, geometry: Geometry, limits: Limits, threads: int, jpegs: CudaJpegs | None = None) -> None:
        """Start the threads; Pillow releases the interpreter lock while it decodes.

        `limits` apply to each request, and to the pixels that are decoded at the same time. `jpegs` decodes what it can
        of a batch first; see `jpegs_for`.
        """
        self._geometry, self._limits, self._jpegs = geometry, limits, jpegs
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode") if threads > 1 else None
        self._budget = PixelBudget(limits.max_pixels)
        pixels.set_limit(limits.max_pixels)

    def decode(self, rows: Sequence[object]) -> Batch:
        """Return one `Ok` a request, or its `Failed` with a 4xx; no row depends on another.

        Raises:
            RuntimeError: as PyTorch raises it, when the CUDA device is lost.
        """
        if self._jpegs is None:
            return Batch(self._map(lambda row: self._rest(self._body(row)), rows))
        done: list[Ok | Failed] = []
        part: list[bytes | Failed] = []
        held = 0
        for row in rows:
            part.append(body := self._body(row))
            held += len(body) if isinstance(body, bytes) else 0
            if held >= self._limits.max_bytes:
                done += self._part(part, self._jpegs)
                part, held = [], 0
        return Batch((*done, *self._part(part, self._jpegs)))

    def _part(self, bodies: Sequence[bytes | Failed], jpegs: CudaJpegs) -> tuple[Ok | Failed, ...]:
        """Decode some rows; their copies take at most as many bytes as two pictures may have."""
        crops = jpegs.decode([body if isinstance(body, bytes) else b"" for body in bodies])
        ready = [body if crop is None else Ok(crop) for body, crop in zip(bodies, crops, strict=True)]
        return self._map(self._rest, ready)

    def _map(self, decode: Callable[[T], Ok | Failed], rows: Sequence[T]) -> tuple[Ok | Failed, ...]:
        mapped = map if self._pool is None or len(rows) < 2 else self._pool.map
        return tuple(mapped(decode, rows))

    def _body(self, row: object) -> bytes | Failed:
        try:
            return extract(row, self._limits)
        except RequestError as error:
            return _failed(error)

    def _rest(self, body: bytes | Ok | Failed) -> Ok | Failed:
        """Decode a body with Pillow; a row that is done already stays as it is."""
        if not isinstance(body, bytes):
            return body
        try:
            return Ok(pixels.decode(body, self._geometry, self._limits.max_pixels, self._budget.hold))
        except RequestError as error:
            return _failed(error)


def jpegs_for(geometry: Geometry, device: str, max_pixels: int) -> tuple[CudaJpegs | None, Choice]:
    """Return what decodes JPEGs on the model's device, or None where Pillow decodes them all, and the reason.

    `device` is where the engine runs, as `cpu` or `cuda:0`; `max_pixels` is the limit of one picture.

    Raises:
        ConfigError: when torchvision is missing. SelfTestError: when it decodes wrongly.
    """
    if geometry.decoding != "cuda":
        return None, Choice(geometry.decoding, "as the archive was built")
    if device == "cpu":
        return None, Choice("full", "the archive is built for JPEGs on a CUDA device, and this worker runs on the CPU")
    if importlib.util.find_spec("torchvision") is None:
        raise ConfigError(
            "this archive's JPEGs are decoded on a CUDA device by torchvision, which is not installed here; install "
            "torchvision, or build the archive with --decoding full"
        )
    import torch

    from beeline.cuda_jpeg import CudaJpegs

    jpegs = CudaJpegs(torch.device(device), geometry, max_pixels)
    return jpegs, Choice("cuda", jpegs.version)


def _failed(error: RequestError) -> Failed:
    # The frames of the traceback and of its cause would hold the picture until the next garbage collection.
    error.__cause__ = error.__context__ = None
    return Failed(error.with_traceback(None))
