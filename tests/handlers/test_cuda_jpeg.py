"""JPEGs decoded on the model's device: Pillow's pixels, Pillow's refusals, and no neighbour pays for another.

No CUDA device is needed: the stand-in for one is the CPU, on which torchvision decodes by libjpeg-turbo and everything
else is the same code. The test marked `gpu` is the same on a device.
"""

from __future__ import annotations

import io
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.io import decode_jpeg

from beeline import cuda_jpeg, pixels
from beeline.cuda_jpeg import CudaJpegs
from beeline.errors import SelfTestError, SpecError
from beeline.spec import Geometry

GEOMETRY = Geometry(64, 56, decoding="cuda")
CPU = torch.device("cpu")


def drawn(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Return a picture no side or colour of which is like another."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    wave = 127 + 120 * np.sin(across / 9) * np.cos(down / 7)
    return Image.fromarray(np.stack([across, down, wave], axis=2).astype(np.uint8)).convert(mode)


def jpeg(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 92, **options})
    return file.getvalue()


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
    # Pillow, too, takes the end for the end and makes the rest grey.
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


def difference(crop: NDArray[np.uint8] | None, body: bytes) -> float:
    assert crop is not None
    assert (crop.shape, crop.dtype) == ((56, 56, 3), np.uint8)
    return float(np.abs(crop.astype(int) - pixels.decode(body, GEOMETRY)).max())


def test_pixels_are_pillows_but_for_rounding(jpegs: CudaJpegs) -> None:
    bodies = list(TAKEN.values())
    for name, body, crop in zip(TAKEN, bodies, jpegs.decode(bodies), strict=True):
        assert difference(crop, body) <= 2, name


def test_bicubic_too() -> None:
    geometry = Geometry(64, 56, "bicubic", "cuda")
    (crop,) = CudaJpegs(CPU, geometry).decode([TAKEN["wide"]])
    assert crop is not None
    assert np.abs(crop.astype(int) - pixels.decode(TAKEN["wide"], geometry)).max() <= 3


@pytest.mark.parametrize("name", LEFT)
def test_what_pillow_is_to_judge_is_left_to_it(jpegs: CudaJpegs, name: str) -> None:
    around = [TAKEN["wide"], LEFT[name], TAKEN["high"]]
    first, left, last = jpegs.decode(around)
    assert left is None
    assert difference(first, around[0]) <= 2
    assert difference(last, around[2]) <= 2


def test_a_picture_that_the_device_fails_on_costs_its_neighbours_nothing(
    jpegs: CudaJpegs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failure is a fake: what nvJPEG cannot decode it refuses together with the rest of the batch."""
    calls = list[int]()

    def fails(given: Sequence[torch.Tensor], **options: Any) -> Any:
        calls.append(len(given))
        if any(len(each) == len(TAKEN["progressive"]) for each in given):
            raise RuntimeError("Failed to decode jpeg: 4")
        return decode_jpeg(given, **options)

    monkeypatch.setattr(cuda_jpeg, "decode_jpeg", fails)
    bodies = [TAKEN["wide"], TAKEN["progressive"], TAKEN["high"]]
    first, left, last = jpegs.decode(bodies)
    assert calls == [3, 1, 2, 1, 1]
    assert left is None
    assert difference(first, bodies[0]) <= 2
    assert difference(last, bodies[2]) <= 2


def test_a_lost_device_is_no_pictures_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is a fake: nvJPEG's failure does not say that the device is lost, the next call to it does."""
    jpegs = CudaJpegs(CPU, GEOMETRY, LIMIT)
    jpegs._device = torch.device("cuda:0")

    def fails(given: object, **options: object) -> None:
        raise RuntimeError("Error while decoding JPEG images: Failed to synchronize CUDA stream: 700")

    def lost(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(cuda_jpeg, "decode_jpeg", fails)
    monkeypatch.setattr("torch.cuda.synchronize", lost)
    with pytest.raises(RuntimeError, match="CUDA error"):
        jpegs.decode([TAKEN["wide"]])
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    assert jpegs.decode([TAKEN["wide"], TAKEN["high"]]) == [None, None]


def test_what_failed_is_not_held_while_its_parts_are_tried(jpegs: CudaJpegs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The failure is a fake: memory runs out when two pictures are resized."""
    alive: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []

    def decodes(given: Sequence[torch.Tensor], **options: Any) -> list[torch.Tensor]:
        held.append(sum(one() is not None for one in alive))
        planes = decode_jpeg(given, **options)
        alive.extend(weakref.ref(each) for each in planes)
        return planes

    def resizes(pictures: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        if sum(one() is not None for one in alive) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return torch.nn.functional.interpolate(pictures, *rest, **options)

    monkeypatch.setattr(cuda_jpeg, "decode_jpeg", decodes)
    monkeypatch.setattr(cuda_jpeg, "interpolate", resizes)
    assert None not in [None if crop is None else "" for crop in jpegs.decode([TAKEN["wide"], TAKEN["high"]])]
    assert held == [0, 0, 0]


def test_a_size_that_pillow_did_not_read_is_pillows_to_look_into(
    jpegs: CudaJpegs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def larger(given: Sequence[torch.Tensor], **options: Any) -> list[torch.Tensor]:
        return [torch.zeros(3, 3000, 3000, dtype=torch.uint8), *decode_jpeg(given, **options)[1:]]

    monkeypatch.setattr(cuda_jpeg, "decode_jpeg", larger)
    left, crop = jpegs.decode([TAKEN["wide"], TAKEN["high"]])
    assert left is None
    assert difference(crop, TAKEN["high"]) <= 2


def test_as_many_pixels_at_once_as_one_picture_may_have(jpegs: CudaJpegs, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[int]()

    def counting(given: Sequence[torch.Tensor], **options: Any) -> Any:
        calls.append(len(given))
        return decode_jpeg(given, **options)

    monkeypatch.setattr(cuda_jpeg, "decode_jpeg", counting)
    bodies = [TAKEN["wide"]] * 7
    assert all(difference(crop, TAKEN["wide"]) <= 2 for crop in jpegs.decode(bodies))
    # 166,500 pixels each, 500,000 at once.
    assert calls == [3, 3, 1]


def swapped(given: Sequence[torch.Tensor], **options: Any) -> Any:
    return [planes.flip(0) for planes in decode_jpeg(given, **options)]


def without_antialias(planes: torch.Tensor, size: Any, **options: Any) -> torch.Tensor:
    return torch.nn.functional.interpolate(planes, size, **{**options, "antialias": False})


def nearest(planes: torch.Tensor, size: Any, **options: Any) -> torch.Tensor:
    return torch.nn.functional.interpolate(planes, size, mode="nearest")


def zeros(planes: torch.Tensor, size: Any, **options: Any) -> torch.Tensor:
    return torch.zeros(1, 3, *size)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("decode_jpeg", swapped), ("interpolate", without_antialias), ("interpolate", nearest), ("interpolate", zeros)],
)
def test_a_device_that_decodes_or_resizes_wrongly_serves_nothing(
    monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any
) -> None:
    monkeypatch.setattr(cuda_jpeg, name, wrong)
    with pytest.raises(SelfTestError, match=r"of 255 from Pillow's on average, 3 are allowed.*--decoding full"):
        CudaJpegs(CPU, GEOMETRY)


@pytest.mark.parametrize("resize", [8, 224, 512, 700, 4000])
def test_it_proves_itself_at_any_size(resize: int) -> None:
    CudaJpegs(CPU, Geometry(resize, resize - 4, decoding="cuda"))


def test_a_device_that_decodes_nothing_serves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(given: object, **options: object) -> None:
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")

    monkeypatch.setattr(cuda_jpeg, "decode_jpeg", fails)
    with pytest.raises(SelfTestError, match=r"decodes no JPEG .*not compiled with nvJPEG support"):
        CudaJpegs(CPU, GEOMETRY)


def test_a_filter_that_pytorch_has_not() -> None:
    with pytest.raises(SpecError, match=r"geometry.interpolation is 'lanczos'.*bilinear and bicubic"):
        CudaJpegs(CPU, Geometry(64, 56, "lanczos", "cuda"))


@pytest.mark.shared
def test_every_awkward_picture_is_pillows_or_left_to_it(shared_data: Path) -> None:
    geometry = Geometry(256, 224, decoding="cuda")
    jpegs = CudaJpegs(CPU, geometry)
    decoded = 0
    for path in sorted((shared_data / "awkward").rglob("*.*")) + sorted((shared_data / "imagenet_samples").iterdir()):
        body = path.read_bytes()
        (crop,) = jpegs.decode([body])
        if crop is not None:
            decoded += 1
            off = np.abs(crop.astype(int) - pixels.decode(body, geometry))
            assert off.mean() < 1, path.name
            assert off.max() <= 12, path.name
    assert decoded > 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is there")
def test_nvjpegs_pixels_are_near_pillows() -> None:
    jpegs = CudaJpegs(torch.device("cuda:0"), GEOMETRY, LIMIT)
    # Were a part of a picture left as it was in memory, it would be this one's.
    jpegs.decode([jpeg(Image.new("RGB", (500, 333), "white"))] * 3)
    bodies = [*TAKEN.values(), *LEFT.values()]
    found = dict(zip([*TAKEN, *LEFT], jpegs.decode(bodies), strict=True))
    assert all(found[name] is None for name in LEFT)
    for name, body in TAKEN.items():
        crop = found[name]
        if crop is not None:
            assert np.abs(crop.astype(int) - pixels.decode(body, GEOMETRY)).mean() < 3, name
    assert found["wide"] is not None
