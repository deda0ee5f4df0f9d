"""Positions, the pixel budget, and rows to pictures, with JPEGs on a device too.

The stand-in for the device is the CPU, as in test_cuda_jpeg.py; without a device, all tests of the handler decode so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from beeline.batch import Batch, Failed, Ok, PixelBudget
from beeline.cuda_jpeg import CudaJpegs
from beeline.decoder import Decoder, jpegs_for
from beeline.errors import ConfigError, EmptyBody
from beeline.settings import Limits
from beeline.spec import Geometry, ModelSpec
from tests.conftest import picture
from tests.handlers.test_cuda_jpeg import CPU, GEOMETRY, LIMIT, TAKEN, jpeg
from tests.handlers.test_cuda_jpeg import jpegs as jpegs
from tests.handlers.test_vision_handler import BROKEN, check_all_placements, loaded
from tests.handlers.test_vision_handler import copy as copy


def ok(value: int) -> Ok:
    return Ok(np.full((2, 2, 3), value, np.uint8))


@given(st.lists(st.booleans(), max_size=12))
def test_every_result_returns_to_its_own_row(good: list[bool]) -> None:
    batch = Batch(tuple(ok(i) if flag else Failed(EmptyBody(str(i))) for i, flag in enumerate(good)))
    stacked = batch.stack()
    assert len(stacked) == sum(good)
    results = [str(row[0, 0, 0]) for row in stacked]
    assert batch.scatter(results, lambda row: f"broken {row.error}") == [
        str(i) if flag else f"broken {i}" for i, flag in enumerate(good)
    ]


def test_one_result_too_few_or_too_many_is_an_error_not_a_shift() -> None:
    batch = Batch((ok(0), Failed(EmptyBody()), ok(2)))
    for results in (["a"], ["a", "b", "c"]):
        with pytest.raises(ValueError, match="for 2 decoded pictures"):
            batch.scatter(results, lambda row: "broken")


def test_the_budget_bounds_the_pixels_that_are_held_and_lets_every_decode_through() -> None:
    budget, lock = PixelBudget(100), threading.Lock()
    held, peak, served = 0, 0, 0

    def decode(pixels: int) -> None:
        nonlocal held, peak, served
        with budget.hold(pixels):
            with lock:
                held += min(pixels, 100)
                peak = max(peak, held)
                served += 1
            with lock:
                held -= min(pixels, 100)

    threads = [threading.Thread(target=decode, args=(size,)) for size in (60, 60, 100, 1, 250, 40) * 20]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert served == 120
    assert peak <= 100


def test_the_budget_is_given_back_after_an_error() -> None:
    budget = PixelBudget(10)
    with pytest.raises(RuntimeError), budget.hold(10):
        raise RuntimeError
    with budget.hold(10):
        pass


@pytest.mark.parametrize("threads", [1, 4])
def test_the_pool_keeps_the_order(threads: int) -> None:
    greys = range(0, 250, 5)
    rows = [{"body": picture((grey, grey, grey))} for grey in greys]
    batch = Decoder(Geometry(8, 8), Limits(), threads).decode(rows)
    assert batch.stack()[:, 0, 0, 0].tolist() == list(greys)


def test_jpegs_are_decoded_on_the_device_where_the_archive_says_so_and_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert jpegs_for(Geometry(64, 56), "cuda:0", LIMIT)[1].value == "full"
    found, choice = jpegs_for(GEOMETRY, "cpu", LIMIT)
    assert (found, choice.value) == (None, "full")
    assert "this worker runs on the CPU" in choice.reason
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="torchvision, which is not installed here"):
        jpegs_for(GEOMETRY, "cuda:0", LIMIT)


def test_all_256_placements_of_broken_pictures_with_jpegs_on_the_device(
    copy: Path, edit_spec: Callable[..., ModelSpec]
) -> None:
    geometry = ModelSpec.load(copy).to_dict()["geometry"]
    spec = edit_spec(copy, {"geometry": {**geometry, "decoding": "cuda"}})
    handler, stand_in = loaded(copy), CudaJpegs(CPU, spec.geometry)
    handler.decoder = Decoder(spec.geometry, Limits(), 1, stand_in)
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
    good = {name: jpeg(Image.new("RGB", (90, 70), colour)) for name, colour in colours.items()}
    assert all(crop is not None for crop in stand_in.decode(list(good.values())))
    check_all_placements(handler, good, {**BROKEN, good["red"][:-40]: 422})


def test_at_most_the_bytes_of_two_pictures_are_copied_at_once(
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
