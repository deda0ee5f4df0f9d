"""JPEGs decoded on the model's device: Pillow's pixels, Pillow's refusals, and no neighbour pays for another.

The stand-in for a CUDA device is the CPU, on which torchvision decodes by libjpeg-turbo and everything else is the same
code. The test marked `gpu` needs a device.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.io import decode_jpeg

from beeline import cuda_jpeg, pixels
from beeline.cuda_jpeg import CudaJpegs
from beeline.errors import SelfTestError, SpecError
from beeline.spec import Geometry
from tests.handlers.drawn import encoded

GEOMETRY = Geometry(64, 56, decoding="cuda")
CPU = torch.device("cpu")


def drawn(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Return a picture whose sides and colours all differ."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    wave = 127 + 120 * np.sin(across / 9) * np.cos(down / 7)
    return Image.fromarray(np.stack([across, down, wave], axis=2).astype(np.uint8)).convert(mode)


def jpeg(image: Image.Image, **options: Any) -> bytes:
    return encoded(image, "JPEG", **{"quality": 92, **options})


def turned(by: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = by
    return jpeg(drawn(300, 200), exif=exif)


TAKEN = {
    "wide": jpeg(drawn(500, 333)),
    "high": jpeg(drawn(201, 407)),
    "tiny": jpeg(drawn(9, 7)),
    "grey": jpeg(drawn(300, 200, "L")),
    "progressive": jpeg(drawn(300, 200), progressive=True),
    "all colours": jpeg(drawn(300, 200), subsampling=0),
    "upright": turned(1),
    "zeros behind": jpeg(drawn(300, 200)) + b"\0" * 9,
    # Pillow stops at this end too, and makes the rest grey.
    "cut in the middle, an end behind it": jpeg(drawn(500, 333))[:9000] + b"\xff\xd9",
}
FRAME = TAKEN["wide"].index(b"\xff\xc0")
FRAME_LENGTH = 2 + int.from_bytes(TAKEN["wide"][FRAME + 2 : FRAME + 4], "big")
LEFT = {
    "nothing": b"",
    "no picture": b"no picture",
    "png": b"\x89PNG\r\n\x1a\n" + b"\0" * 40,
    "turned": turned(6),
    "CMYK": jpeg(drawn(300, 200, "CMYK")),
    "strip": jpeg(drawn(900, 20)),
    "cut off": TAKEN["wide"][:-2],
    "rest behind it": TAKEN["wide"] + b"rest",
    "two frame headers": TAKEN["wide"][:FRAME] + TAKEN["wide"][FRAME : FRAME + FRAME_LENGTH] + TAKEN["wide"][FRAME:],
    "another sampling": TAKEN["wide"][: FRAME + 11] + b"\x31" + TAKEN["wide"][FRAME + 12 :],
    "header alone": TAKEN["wide"][:200] + b"\xff\xd9",
    "red, green, blue": jpeg(drawn(300, 200), keep_rgb=True),
    "too large": jpeg(drawn(900, 900)),
}
LIMIT = 500_000


@pytest.fixture(scope="module")
def jpegs() -> CudaJpegs:
    return CudaJpegs(CPU, GEOMETRY, LIMIT)


def check(crops: Sequence[NDArray[np.uint8] | None], bodies: Sequence[bytes], geometry: Geometry = GEOMETRY) -> None:
    """Compare with Pillow's pixels."""
    for crop, body in zip(crops, bodies, strict=True):
        assert crop is not None
        assert (crop.shape, crop.dtype) == ((56, 56, 3), np.uint8)
        assert np.abs(crop.astype(int) - pixels.decode(body, geometry)).max() <= 3


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pixels_are_pillows_but_for_rounding(interpolation: str) -> None:
    geometry, bodies = Geometry(64, 56, interpolation, "cuda"), list(TAKEN.values())
    check(CudaJpegs(CPU, geometry).decode(bodies), bodies, geometry)


@pytest.mark.parametrize("name", LEFT)
def test_a_picture_that_pillow_judges_is_left_to_it(jpegs: CudaJpegs, name: str) -> None:
    first, left, last = jpegs.decode([TAKEN["wide"], LEFT[name], TAKEN["high"]])
    assert left is None
    check([first, last], [TAKEN["wide"], TAKEN["high"]])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that the device decodes."""
    sizes: list[int] = []

    def counting(given: Sequence[torch.Tensor], **rest: Any) -> Any:
        sizes.append(len(given))
        return decode_jpeg(given, **rest)

    monkeypatch.setattr(cuda_jpeg, "decode_jpeg", counting)
    return sizes


def test_at_most_the_pixels_of_one_picture_are_decoded_at_once(jpegs: CudaJpegs, calls: list[int]) -> None:
    check(jpegs.decode([TAKEN["wide"]] * 7), [TAKEN["wide"]] * 7)
    # 166,500 pixels each, 500,000 at once.
    assert calls == [3, 3, 1]


def test_a_picture_that_the_device_fails_on_costs_its_neighbours_nothing(
    jpegs: CudaJpegs, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failure is a fake: a picture that nvJPEG cannot decode makes it refuse the whole batch."""
    counting = vars(cuda_jpeg)["decode_jpeg"]

    def fails(given: Sequence[torch.Tensor], **rest: Any) -> Any:
        decoded = counting(given, **rest)
        if any(len(each) == len(TAKEN["progressive"]) for each in given):
            raise RuntimeError("Failed to decode jpeg: 4")
        return decoded

    monkeypatch.setattr(cuda_jpeg, "decode_jpeg", fails)
    first, left, last = jpegs.decode([TAKEN["wide"], TAKEN["progressive"], TAKEN["high"]])
    assert calls == [3, 1, 2, 1, 1]
    assert left is None
    check([first, last], [TAKEN["wide"], TAKEN["high"]])


def test_a_lost_device_is_no_pictures_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is a fake: nvJPEG's failure does not say that the device is lost, the next call to it does."""
    jpegs = CudaJpegs(CPU, GEOMETRY, LIMIT)
    jpegs._device = torch.device("cuda:0")
    monkeypatch.setattr(cuda_jpeg, "decode_jpeg", Mock(side_effect=RuntimeError("Failed to synchronize")))
    monkeypatch.setattr("torch.cuda.synchronize", Mock(side_effect=RuntimeError("CUDA error: an illegal access")))
    with pytest.raises(RuntimeError, match="CUDA error"):
        jpegs.decode([TAKEN["wide"]])
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    assert jpegs.decode([TAKEN["wide"], TAKEN["high"]]) == [None, None]


def test_a_failed_batch_is_not_held_while_its_parts_are_tried(
    jpegs: CudaJpegs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failure is a fake: memory runs out when two pictures are resized."""
    alive: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []

    def decodes(given: Sequence[torch.Tensor], **rest: Any) -> list[torch.Tensor]:
        held.append(sum(one() is not None for one in alive))
        planes = decode_jpeg(given, **rest)
        alive.extend(weakref.ref(each) for each in planes)
        return planes

    def resizes(*given: Any, **rest: Any) -> torch.Tensor:
        if sum(one() is not None for one in alive) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return interpolate(*given, **rest)

    monkeypatch.setattr(cuda_jpeg, "decode_jpeg", decodes)
    monkeypatch.setattr(cuda_jpeg, "interpolate", resizes)
    check(jpegs.decode([TAKEN["wide"], TAKEN["high"]]), [TAKEN["wide"], TAKEN["high"]])
    assert held == [0, 0, 0]


def test_a_size_that_pillow_did_not_read_is_left_to_pillow(jpegs: CudaJpegs, monkeypatch: pytest.MonkeyPatch) -> None:
    def larger(given: Sequence[torch.Tensor], **rest: Any) -> list[torch.Tensor]:
        return [torch.zeros(3, 3000, 3000, dtype=torch.uint8), *decode_jpeg(given, **rest)[1:]]

    monkeypatch.setattr(cuda_jpeg, "decode_jpeg", larger)
    left, crop = jpegs.decode([TAKEN["wide"], TAKEN["high"]])
    assert left is None
    check([crop], [TAKEN["high"]])


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("decode_jpeg", lambda given, **rest: [planes.flip(0) for planes in decode_jpeg(given, **rest)]),
        ("interpolate", lambda planes, size, **rest: interpolate(planes, size, **{**rest, "antialias": False})),
        ("interpolate", lambda planes, size, **rest: interpolate(planes, size, mode="nearest")),
        ("interpolate", lambda planes, size, **rest: torch.zeros(1, 3, *size)),
    ],
)
def test_a_device_that_decodes_or_resizes_wrongly_serves_nothing(
    monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any
) -> None:
    monkeypatch.setattr(cuda_jpeg, name, wrong)
    with pytest.raises(SelfTestError, match=r"of 255 from Pillow's on average, 3 are allowed.*--decoding full"):
        CudaJpegs(CPU, GEOMETRY)


@pytest.mark.parametrize("resize", [8, 224, 700, 1500])
def test_it_proves_itself_at_any_size(resize: int) -> None:
    CudaJpegs(CPU, Geometry(resize, resize - 4, decoding="cuda"))


def test_a_device_that_decodes_nothing_serves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")
    monkeypatch.setattr(cuda_jpeg, "decode_jpeg", Mock(side_effect=error))
    with pytest.raises(SelfTestError, match=r"decodes no JPEG .*not compiled with nvJPEG support"):
        CudaJpegs(CPU, GEOMETRY)


def test_a_filter_that_pytorch_does_not_have_is_refused() -> None:
    with pytest.raises(SpecError, match=r"geometry.interpolation is 'lanczos'.*bilinear and bicubic"):
        CudaJpegs(CPU, Geometry(64, 56, "lanczos", "cuda"))


@pytest.mark.shared
def test_every_awkward_picture_is_pillows_or_left_to_it(shared_data: Path) -> None:
    geometry = Geometry(256, 224, decoding="cuda")
    bodies = [
        path.read_bytes() for name in ("awkward", "imagenet_samples") for path in (shared_data / name).rglob("*.*")
    ]
    crops = CudaJpegs(CPU, geometry).decode(bodies)
    off = [
        np.abs(a.astype(int) - pixels.decode(b, geometry)) for a, b in zip(crops, bodies, strict=True) if a is not None
    ]
    assert len(off) > 20
    assert (max(each.mean() for each in off) < 1, max(each.max() for each in off) <= 12) == (True, True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is there")
def test_nvjpegs_pixels_are_near_pillows() -> None:
    jpegs = CudaJpegs(torch.device("cuda:0"), GEOMETRY, LIMIT)
    # A part that the decoder leaves unwritten in memory would be this picture's.
    jpegs.decode([jpeg(Image.new("RGB", (500, 333), "white"))] * 3)
    bodies = {**TAKEN, **LEFT}
    crops = dict(zip(bodies, jpegs.decode(list(bodies.values())), strict=True))
    decoded = {name: crop for name, crop in crops.items() if crop is not None}
    assert "wide" in decoded
    assert not decoded.keys() & LEFT.keys()
    for name, crop in decoded.items():
        assert np.abs(crop.astype(int) - pixels.decode(bodies[name], GEOMETRY)).mean() < 3, name
