"""A batch's rows to pictures: each by itself on a pool of threads, or JPEGs together on a CUDA device."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from beeline import pixels
from beeline.batch import Batch, Failed, Ok, PixelBudget
from beeline.errors import ConfigError, RequestError
from beeline.payload import Payload, extract
from beeline.settings import Choice, Limits
from beeline.spec import Geometry

if TYPE_CHECKING:
    from beeline.cuda_jpeg import CudaJpegs

T = TypeVar("T")


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

        Raise `RuntimeError` as PyTorch raises it, when the CUDA device is lost.
        """
        if self._jpegs is None:
            return Batch(self._map(lambda row: self._rest(self._body(row)), rows))
        done: list[Ok | Failed] = []
        part: list[Payload | Failed] = []
        held = 0
        for row in rows:
            part.append(body := self._body(row))
            held += len(body.picture) if isinstance(body, Payload) else 0
            if held >= self._limits.max_bytes:
                done += self._part(part, self._jpegs)
                part, held = [], 0
        return Batch((*done, *self._part(part, self._jpegs)))

    def _part(self, bodies: Sequence[Payload | Failed], jpegs: CudaJpegs) -> tuple[Ok | Failed, ...]:
        """Decode some rows; their copies take at most as many bytes as two pictures may have."""
        crops = jpegs.decode([body.picture if isinstance(body, Payload) else b"" for body in bodies])
        ready = [
            body if crop is None or isinstance(body, Failed) else Ok(crop, body.prompt, body.max_tokens)
            for body, crop in zip(bodies, crops, strict=True)
        ]
        return self._map(self._rest, ready)

    def _map(self, decode: Callable[[T], Ok | Failed], rows: Sequence[T]) -> tuple[Ok | Failed, ...]:
        mapped = map if self._pool is None or len(rows) < 2 else self._pool.map
        return tuple(mapped(decode, rows))

    def _body(self, row: object) -> Payload | Failed:
        try:
            return extract(row, self._limits)
        except RequestError as error:
            return _failed(error)

    def _rest(self, body: Payload | Ok | Failed) -> Ok | Failed:
        """Decode a body with Pillow; a row that is done already stays as it is."""
        if not isinstance(body, Payload):
            return body
        try:
            crop = pixels.decode(body.picture, self._geometry, self._limits.max_pixels, self._budget.hold)
            return Ok(crop, body.prompt, body.max_tokens)
        except RequestError as error:
            return _failed(error)


def jpegs_for(geometry: Geometry, device: str, max_pixels: int) -> tuple[CudaJpegs | None, Choice]:
    """Return what decodes JPEGs on the model's device, or None where Pillow decodes them all, and the reason.

    `device` is where the engine runs, as `cpu` or `cuda:0`; `max_pixels` is the limit of one picture.

    Raise `ConfigError` when torchvision is missing, `SelfTestError` when it decodes wrongly.
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
