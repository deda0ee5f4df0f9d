"""JPEGs on the CUDA device that the model runs on: decoded by nvJPEG, through torchvision, and resized there.

The result is what `pixels.decode` returns, as near as decoders are to each other; the crops come back to the host, 150
kB each, so that every engine takes them. What such a device is no match for (another format, a turned or four-coloured
picture, one that is cut off) is left to Pillow, which decodes it or says what is wrong with it.

This has not been run on a CUDA device yet; `make test-gpu` is to do that. On a CPU torchvision decodes by
libjpeg-turbo, and everything else here is the same: so the tests run it.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_jpeg

from beeline import formats, pixels
from beeline.errors import RequestError, SelfTestError, SpecError
from beeline.settings import MAX_PIXELS
from beeline.spec import Geometry

Pixels = NDArray[np.uint8]
Size = tuple[int, int]

_FILTERS = ("bilinear", "bicubic")
_END = b"\xff\xd9"
# Start of a scan, and of a frame: all from C0 to CF but the tables DHT, JPG and DAC.
_SCAN = 0xDA
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Of the components, where they are named so: then they are no brightness and colour, which nvJPEG takes them for.
_RED_GREEN_BLUE = tuple(b"RGB")
# How much finer brightness is sampled than colour, across and down: 4:4:4, 4:2:2, 4:4:0, 4:2:0, 4:1:1. torchvision
# refuses the whole batch for any other.
_SAMPLING = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1))
# The whole picture is resized before the crop: of a strip that would be a picture many times as large.
_MOST_STRETCH = 8
# On average over a picture, of 255; decoders differ in how they enlarge the colours.
_MOST_DIFFERENCE = 3.0
# The drawn picture is so many times as large as the model's, so that a resize without a proper filter shows; but its
# shorter side has no more pixels than this.
_PROOF_TIMES, _PROOF_MOST = 4, 2048

logger = logging.getLogger(__name__)


class CudaJpegs:
    """Decodes the JPEGs of a batch together, and proves when it is made that it does so rightly."""

    def __init__(self, device: torch.device, geometry: Geometry, max_pixels: int = MAX_PIXELS) -> None:
        """Decode a picture, and compare it with Pillow's.

        Args:
            device: a CUDA device; a CPU for tests.
            geometry: resize, crop and interpolation.
            max_pixels: of one picture, and of those that are decoded at once.

        Raises:
            SpecError: for an interpolation that PyTorch does not have. SelfTestError: for other pixels than Pillow's.
        """
        if geometry.interpolation not in _FILTERS:
            raise SpecError(
                f"geometry.interpolation is {geometry.interpolation!r} and geometry.decoding 'cuda', which has "
                f"{' and '.join(_FILTERS)}: build the archive with --decoding full"
            )
        self._device, self._geometry, self._most = device, geometry, max_pixels
        self._why = ""
        self._prove()

    @property
    def version(self) -> str:
        """Return what decodes, as logs say it."""
        decoder = "nvJPEG" if self._device.type == "cuda" else "libjpeg-turbo"
        return f"{self._device} by {decoder} of torchvision {torchvision.__version__}"

    def decode(self, bodies: Sequence[bytes]) -> list[Pixels | None]:
        """Return each picture as `[crop, crop, 3]` uint8, and None for each that is Pillow's to decode or to refuse.

        Args:
            bodies: encoded pictures of any format, or bytes that are none.

        Raises:
            RuntimeError: as PyTorch raises it, when the device is lost.
        """
        found: list[Pixels | None] = [None] * len(bodies)
        for part, sizes in self._parts(bodies):
            crops = self._decoded([bodies[index] for index in part], sizes)
            for index, crop in zip(part, crops, strict=True):
                found[index] = crop
        return found

    def _parts(self, bodies: Sequence[bytes]) -> list[tuple[list[int], list[Size]]]:
        """Return positions and sizes of those that the device is to decode, as many together as one may be large."""
        parts: list[tuple[list[int], list[Size]]] = []
        held = self._most
        for index, body in enumerate(bodies):
            size = _size(body, self._most)
            if size is None:
                continue
            if held + size[0] * size[1] > self._most:
                parts.append(([], []))
                held = 0
            parts[-1][0].append(index)
            parts[-1][1].append(size)
            held += size[0] * size[1]
        return parts

    def _decoded(self, bodies: Sequence[bytes], sizes: Sequence[Size]) -> list[Pixels | None]:
        """Decode some together; where that fails each half by itself, down to the one that it fails on."""
        found = self._together(bodies, sizes)
        if found is not None:
            return found
        if self._device.type == "cuda":
            # What failed may be still under way, and its memory is free by now. A device that is lost says so here.
            torch.cuda.synchronize(self._device)
        if len(bodies) == 1:
            logger.info("a JPEG is left to Pillow: %s", self._why)
            return [None]
        half = len(bodies) // 2
        return self._decoded(bodies[:half], sizes[:half]) + self._decoded(bodies[half:], sizes[half:])

    def _together(self, bodies: Sequence[bytes], sizes: Sequence[Size]) -> list[Pixels | None] | None:
        """Return the crops, or None where the device fails; nothing that it took is held then."""
        try:
            with torch.inference_mode():
                given = [torch.from_numpy(np.frombuffer(body, np.uint8).copy()) for body in bodies]
                decoded = decode_jpeg(given, mode=ImageReadMode.RGB, device=self._device)
                # A size other than what Pillow read and judged is Pillow's to look into.
                good = [planes.shape[1:] == size for planes, size in zip(decoded, sizes, strict=True)]
                crops = [self._resized(planes) for planes, fits in zip(decoded, good, strict=True) if fits]
                # Waits until all is done: torchvision's decoder does not wait for what others do with this memory.
                ready = iter(torch.stack(crops).cpu().numpy() if crops else ())
                return [next(ready) if fits else None for fits in good]
        except RuntimeError as error:
            self._why = " ".join(str(error).split())[:200]
            return None

    def _resized(self, planes: Tensor) -> Tensor:
        """Return `[crop, crop, 3]` uint8 of `[3, height, width]`, in the two steps of torchvision's own transforms."""
        wide, high, left, top = pixels.placed(planes.shape[2], planes.shape[1], self._geometry)
        crop = self._geometry.crop
        small = interpolate(
            planes[None].float(), (high, wide), mode=self._geometry.interpolation, align_corners=False, antialias=True
        )[0, :, top : top + crop, left : left + crop]
        return small.round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0)

    def _prove(self) -> None:
        """Decode a drawn picture in both ways; no side or colour of it is like another, and it has a grain.

        Raises:
            SelfTestError: when they differ by more than decoders do.
        """
        resize = self._geometry.resize
        high = resize * max(1, min(_PROOF_TIMES, _PROOF_MOST // resize))
        wide = high + 32
        across, down = np.meshgrid(np.linspace(0, 255, wide), np.linspace(0, 255, high))
        grain = np.random.default_rng(0).integers(0, 64, (high, wide, 1))
        drawn = np.stack([across, down, 255 - (across + down) / 2], axis=2) * 0.75 + grain
        file = io.BytesIO()
        Image.fromarray(drawn.astype(np.uint8)).save(file, "JPEG", quality=95)
        (crop,) = self.decode([file.getvalue()])
        if crop is None:
            raise SelfTestError(f"{self.version} decodes no JPEG ({self._why}): build the archive with --decoding full")
        expected = pixels.decode(file.getvalue(), self._geometry)
        difference = float(np.abs(crop.astype(np.float32) - expected).mean())
        if difference > _MOST_DIFFERENCE:
            raise SelfTestError(
                f"{self.version} decodes a JPEG to pixels that are {difference:.1f} of 255 from Pillow's on average, "
                f"{_MOST_DIFFERENCE:g} are allowed: build the archive with --decoding full"
            )


def _size(body: bytes, most: int) -> Size | None:
    """Return height and width of a picture that the device can decode as Pillow would, and None for any other."""
    # Nothing but zeros may follow: of what was cut off the last end is a thumbnail's, and nvJPEG may not say so.
    if formats.kind_of(body[:16]) != "JPEG" or not body.rstrip(b"\0").endswith(_END):
        return None
    try:
        image = pixels.probe(body, most)
    except RequestError:
        return None
    layers: list[tuple[int, int, int, int]] = getattr(image, "layer", [])
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or image.info.get("adobe_transform") == 0:
        return None
    if tuple(layer[0] for layer in layers) == _RED_GREEN_BLUE or _frames(body) != 1:
        return None
    if image.mode == "RGB" and (layers[0][1:3] not in _SAMPLING or any(each[1:3] != (1, 1) for each in layers[1:])):
        return None
    if max(image.size) > _MOST_STRETCH * min(image.size):
        return None
    return (image.height, image.width) if pixels.orientation(image) == 1 else None


def _frames(body: bytes) -> int:
    """Return how many frame headers stand before the first scan: of two, decoders may take either."""
    at, found = 2, 0
    while at + 4 <= len(body) and body[at] == 0xFF:
        marker = body[at + 1]
        if marker == 0xFF:
            # Fill bytes may precede a marker.
            at += 1
            continue
        if marker == _SCAN:
            return found
        found += marker in _FRAMES
        at += 2 + int.from_bytes(body[at + 2 : at + 4], "big")
    return 0
