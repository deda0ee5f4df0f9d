"""A batch's rows to pictures with JPEGs on a device: where it is used, in parts, and no neighbour harmed.

The stand-in for the device is the CPU, as in test_cuda_jpeg.py; without a device, all tests of the handler use it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from beeline.cuda_jpeg import CudaJpegs
from beeline.decoder import Decoder, jpegs_for
from beeline.errors import ConfigError
from beeline.settings import Limits
from beeline.spec import Geometry, ModelSpec
from tests.conftest import picture, write_checksums
from tests.handlers.engines.test_contract import check_all_placements
from tests.handlers.test_cuda_jpeg import CPU, GEOMETRY, LIMIT, TAKEN, jpeg
from tests.handlers.test_cuda_jpeg import jpegs as jpegs
from tests.handlers.test_vision_handler import BROKEN, new_context
from vision_handler import VisionHandler


def test_where_it_is_used_and_why_not() -> None:
    full = Geometry(64, 56)
    assert jpegs_for(full, "cuda:0", LIMIT)[1].value == "full"
    found, choice = jpegs_for(GEOMETRY, "cpu", LIMIT)
    assert (found, choice.value) == (None, "full")
    assert "this worker runs on the CPU" in choice.reason


def test_without_torchvision_a_worker_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="torchvision, which is not installed here"):
        jpegs_for(GEOMETRY, "cuda:0", LIMIT)


def test_all_256_placements_of_broken_pictures_with_jpegs_on_the_device(colour_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(colour_model, tmp_path / "model"))
    values = ModelSpec.load(folder).to_dict()
    spec = ModelSpec.from_dict({**values, "geometry": {**values["geometry"], "decoding": "cuda"}})
    spec.save(folder / "model_spec.json")
    write_checksums(folder, spec)
    handler = VisionHandler()
    handler.initialize(new_context(folder))
    stand_in = CudaJpegs(CPU, spec.geometry)
    handler.decoder = Decoder(spec.geometry, Limits(), 1, stand_in)
    colours = {name: jpeg(Image.new("RGB", (90, 70), name)) for name in ("red", "green", "blue")}
    colours = {**colours, "green": jpeg(Image.new("RGB", (90, 70), (0, 255, 0)))}
    assert None not in [None if crop is None else "decoded" for crop in stand_in.decode(list(colours.values()))]
    check_all_placements(handler, colours, {**BROKEN, colours["red"][:-40]: 422})


def test_no_more_bytes_are_copied_at_once_than_two_pictures_may_have(
    jpegs: CudaJpegs, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[int] = []

    def counts(bodies: Sequence[bytes]) -> list[NDArray[np.uint8] | None]:
        parts.append(len(bodies))
        return [None] * len(bodies)

    monkeypatch.setattr(jpegs, "decode", counts)
    limits = Limits(max_bytes=2 * len(TAKEN["wide"]))
    batch = Decoder(GEOMETRY, limits, 2, jpegs).decode([{"body": TAKEN["wide"]}] * 5 + [{"body": b""}])
    assert parts == [2, 2, 2]
    assert batch.good == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("threads", [1, 4])
def test_the_pool_keeps_the_order(threads: int) -> None:
    greys = range(0, 250, 5)
    rows = [{"body": picture((grey, grey, grey))} for grey in greys]
    batch = Decoder(Geometry(8, 8), Limits(), threads).decode(rows)
    assert batch.stack()[:, 0, 0, 0].tolist() == list(greys)
