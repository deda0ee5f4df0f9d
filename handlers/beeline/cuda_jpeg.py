"""JPEGs on the model's CUDA device: decoded by nvJPEG, through torchvision, and resized there.

The result is that of `pixels.decode`, up to the differences between decoders. The crops, 150 kB each, come back to the
host, so that every engine takes them. Pillow decodes or refuses the rest: other formats, rotated pictures, pictures of
four colours, and truncated ones.

This has not been run on a CUDA device yet (`make test-gpu` does). The tests run it on a CPU, where torchvision decodes
by libjpeg-turbo and the rest is the same.
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

from beeline import firewall, formats, pixels
from beeline.errors import RequestError, SelfTestError, SpecError, short
from beeline.settings import MAX_PIXELS
from beeline.spec import Geometry

Pixels = NDArray[np.uint8]
Size = tuple[int, int]

_FILTERS = ("bilinear", "bicubic")
# Component names of a JPEG in RGB; nvJPEG would take them for brightness and colour.
_RED_GREEN_BLUE = tuple(b"RGB")
# How much finer brightness is sampled than colour, across and down: 4:4:4, 4:2:2, 4:4:0, 4:2:0, 4:1:1. torchvision
# refuses a whole batch for any other.
_SAMPLING = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1))
# The mean difference over a picture, of 255; decoders enlarge colours differently.
_MOST_DIFFERENCE = 3.0

logger = logging.getLogger(__name__)


class CudaJpegs:
    """Decodes the JPEGs of a batch together; the constructor proves that it decodes correctly."""

    def __init__(self, device: torch.device, geometry: Geometry, max_pixels: int = MAX_PIXELS) -> None:
        """Decode a picture, and compare it with Pillow's.

        `device` is a CPU in tests. `max_pixels` limits one picture, and those that are decoded at once.

        Raises:
            SpecError: for an interpolation that PyTorch does not have. SelfTestError: for pixels unlike Pillow's.
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
        """Return the device and the decoder, for logs."""
        decoder = "nvJPEG" if self._device.type == "cuda" else "libjpeg-turbo"
        return f"{self._device} by {decoder} of torchvision {torchvision.__version__}"

    def decode(self, bodies: Sequence[bytes]) -> list[Pixels | None]:
        """Return each picture as `[crop, crop, 3]` uint8, or None where Pillow must decode or refuse it.

        Raises:
            RuntimeError: as PyTorch raises it, when the device is lost.
        """
        crops: list[Pixels | None] = [None] * len(bodies)
        for part in self._parts(bodies):
            jpegs = [(bodies[index], size) for index, size in part.items()]
            for index, crop in zip(part, self._decoded(jpegs), strict=True):
                crops[index] = crop
        return crops

    def _parts(self, bodies: Sequence[bytes]) -> list[dict[int, Size]]:
        """Return the sizes of what the device decodes by position, in parts of no more pixels than one may have."""
        parts: list[dict[int, Size]] = []
        held = self._most
        for index, body in enumerate(bodies):
            if (size := _size(body, self._most)) is not None:
                held += size[0] * size[1]
                if held > self._most:
                    parts.append({})
                    held = size[0] * size[1]
                parts[-1][index] = size
        return parts

    def _decoded(self, jpegs: Sequence[tuple[bytes, Size]]) -> list[Pixels | None]:
        """Decode pictures together; after a failure decode each half by itself, down to the picture that fails."""
        crops = self._together(jpegs)
        if crops is not None:
            return crops
        if self._device.type == "cuda":
            # The failed work may still run, in memory that was freed. A lost device raises here.
            torch.cuda.synchronize(self._device)
        if len(jpegs) == 1:
            logger.info("a JPEG is left to Pillow: %s", self._why)
            return [None]
        half = len(jpegs) // 2
        return self._decoded(jpegs[:half]) + self._decoded(jpegs[half:])

    def _together(self, jpegs: Sequence[tuple[bytes, Size]]) -> list[Pixels | None] | None:
        """Return the crops, or None where the device fails; its memory is free then."""
        try:
            with torch.inference_mode():
                given = [torch.from_numpy(np.frombuffer(body, np.uint8).copy()) for body, _ in jpegs]
                decoded = decode_jpeg(given, mode=ImageReadMode.RGB, device=self._device)
                # Pillow takes a picture whose size is not the one that Pillow read and judged.
                good = [planes.shape[1:] == size for planes, (_, size) in zip(decoded, jpegs, strict=True)]
                crops = [self._resized(planes) for planes, fits in zip(decoded, good, strict=True) if fits]
                # This waits for the device: torchvision's decoder does not wait for other users of its memory.
                ready = iter(torch.stack(crops).cpu().numpy() if crops else ())
                return [next(ready) if fits else None for fits in good]
        except RuntimeError as error:
            self._why = short(error)
            return None

    def _resized(self, planes: Tensor) -> Tensor:
        """Return `[crop, width, 3]` uint8 of `[3, height, width]`, in the two steps of torchvision's own transforms."""
        wide, high, left, top = pixels.placed(planes.shape[2], planes.shape[1], self._geometry)
        tall, broad = self._geometry.shape
        small = interpolate(
            planes[None].float(), (high, wide), mode=self._geometry.interpolation, align_corners=False, antialias=True
        )[0, :, top : top + tall, left : left + broad]
        return small.round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0)

    def _prove(self) -> None:
        """Decode a drawn picture in both ways; its sides and colours differ, and it has a grain."""
        resize = self._geometry.resize
        # Four times the model's size where that is not too large, so that a resize without a filter shows.
        high = resize * max(1, min(4, 2048 // resize))
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
    # Only zeros may follow the end marker. A truncated file may end with its thumbnail's marker, and nvJPEG may not
    # notice.
    if formats.kind_of(body[:16]) != "JPEG" or not body.rstrip(b"\0").endswith(b"\xff\xd9"):
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
    # The whole picture is resized before the crop, which would make a narrow strip many times as large.
    if max(image.size) > 8 * min(image.size):
        return None
    return (image.height, image.width) if pixels.orientation(image) == 1 else None


def _frames(body: bytes) -> int:
    """Return the number of frame headers before the first scan; with two, decoders may take either."""
    count = 0
    for code, at, gap in firewall.markers(body):
        # Only fill bytes may precede a marker.
        if code == firewall.SCAN or body[at - 2 - gap : at - 2].strip(b"\xff"):
            return count if code == firewall.SCAN else 0
        count += code in firewall.FRAMES
    return 0
