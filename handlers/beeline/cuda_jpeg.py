"""JPEGs on the CUDA device that the model runs on: decoded by nvJPEG, through torchvision, and resized there.

The result is what `pixels.decode` returns, but for rounding: the crops come back to the host, 150 kB each, so that
every engine takes them. What such a device is no match for (another format, a turned or four-coloured picture, one that
is cut off) is left to Pillow, which decodes it or says what is wrong with it.

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

from beeline import pixels
from beeline.errors import RequestError, SelfTestError, SpecError
from beeline.spec import Geometry

Pixels = NDArray[np.uint8]

_FILTERS = ("bilinear", "bicubic")
_ORIENTATION = 0x0112
_END = b"\xff\xd9"
# Of the components, where they are named so: then they are no brightness and colour, which nvJPEG takes them for.
_RED_GREEN_BLUE = tuple(b"RGB")
# The whole picture is resized before the crop: of a strip that would be a picture many times as large.
_MOST_STRETCH = 8
# On average over a picture, of 255; decoders differ in how they enlarge the colours.
_MOST_DIFFERENCE = 3.0

logger = logging.getLogger(__name__)


class CudaJpegs:
    """Decodes the JPEGs of a batch together, and proves when it is made that it does so rightly."""

    def __init__(self, device: torch.device, geometry: Geometry, max_pixels: int = pixels.MAX_PIXELS) -> None:
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
        self._prove()

    @property
    def version(self) -> str:
        """Return what decodes, as logs say it."""
        return (
            f"{self._device} by {'nvJPEG' if self._device.type == 'cuda' else 'libjpeg-turbo'} of torchvision "
            + str(torchvision.__version__)
        )

    def decode(self, bodies: Sequence[bytes]) -> list[Pixels | None]:
        """Return each picture as `[crop, crop, 3]` uint8, and None for each that is Pillow's to decode or to refuse.

        Args:
            bodies: encoded pictures of any format, or bytes that are none.

        Raises:
            RuntimeError: as PyTorch raises it, when the device is lost.
        """
        found: list[Pixels | None] = [None] * len(bodies)
        for part in self._parts(bodies):
            crops = self._decoded([bodies[index] for index in part])
            for index, crop in zip(part, crops, strict=True):
                found[index] = crop
        return found

    def _parts(self, bodies: Sequence[bytes]) -> list[list[int]]:
        """Return the positions of those that the device is to decode, together as many as its memory is kept for."""
        parts: list[list[int]] = []
        held = self._most
        for index, body in enumerate(bodies):
            size = _pixels(body, self._most)
            if size is None:
                continue
            if held + size > self._most:
                parts.append([])
                held = 0
            parts[-1].append(index)
            held += size
        return parts

    def _decoded(self, bodies: Sequence[bytes]) -> list[Pixels | None]:
        """Decode some together; where that fails each by itself, so that one does not cost its neighbours theirs."""
        try:
            with torch.inference_mode():
                given = [torch.from_numpy(np.frombuffer(body, np.uint8).copy()) for body in bodies]
                decoded = decode_jpeg(given, mode=ImageReadMode.RGB, device=self._device)
                crops = torch.stack([self._resized(each) for each in decoded])
                return list(crops.cpu().numpy())
        except RuntimeError as error:
            if "CUDA error" in str(error) and "out of memory" not in str(error):
                raise
            if len(bodies) > 1:
                return [self._decoded([body])[0] for body in bodies]
            logger.info("a JPEG is left to Pillow: %s", " ".join(str(error).split())[:200])
            return [None]

    def _resized(self, planes: Tensor) -> Tensor:
        """Return `[crop, crop, 3]` uint8 of `[3, height, width]`, in the two steps of torchvision's own transforms."""
        high, wide = _resized_size(planes.shape[1], planes.shape[2], self._geometry.resize)
        crop = self._geometry.crop
        top, left = round((high - crop) / 2), round((wide - crop) / 2)
        small = interpolate(
            planes[None].float(), (high, wide), mode=self._geometry.interpolation, align_corners=False, antialias=True
        )[0, :, top : top + crop, left : left + crop]
        return small.round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0)

    def _prove(self) -> None:
        """Decode a drawn picture in both ways; it is no square, and no colour or side of it is like another.

        Raises:
            SelfTestError: when they differ by more than decoders do.
        """
        high, wide = self._geometry.resize, self._geometry.resize + 32
        across, down = np.meshgrid(np.linspace(0, 255, wide), np.linspace(0, 255, high))
        drawn = np.stack([across, down, 255 - (across + down) / 2], axis=2).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(drawn).save(file, "JPEG", quality=95)
        (crop,) = self.decode([file.getvalue()])
        if crop is None:
            raise SelfTestError(
                f"{self.version} decodes no JPEG; look for why in this worker's log, or build the archive with "
                "--decoding full"
            )
        expected = pixels.decode(file.getvalue(), self._geometry)
        difference = float(np.abs(crop.astype(np.float32) - expected).mean())
        if difference > _MOST_DIFFERENCE:
            raise SelfTestError(
                f"{self.version} decodes a JPEG to pixels that are {difference:.1f} of 255 from Pillow's on average, "
                f"{_MOST_DIFFERENCE:g} are allowed: build the archive with --decoding full"
            )


def _pixels(body: bytes, most: int) -> int | None:
    """Return the pixels of a picture that the device can decode as Pillow would, and None for any other."""
    # Nothing but zeros may follow: of what was cut off the last end is a thumbnail's, and nvJPEG may not say so.
    if not body.rstrip(b"\0").endswith(_END):
        return None
    try:
        image = pixels.probe(body, most)
    except RequestError:
        return None
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or image.info.get("adobe_transform") == 0:
        return None
    if tuple(layer[0] for layer in getattr(image, "layer", ())) == _RED_GREEN_BLUE:
        return None
    if max(image.size) > _MOST_STRETCH * min(image.size):
        return None
    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
    except Exception:  # noqa: BLE001 - whatever a damaged EXIF block makes Pillow raise
        turned = True
    return None if turned else image.width * image.height


def _resized_size(height: int, width: int, short: int) -> tuple[int, int]:
    """Return height and width with the shorter one `short`, rounded as torchvision's `Resize` rounds."""
    if width <= height:
        return int(short * height / width), short
    return short, int(short * width / height)
