"""Positions and the pixel budget."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beeline.batch import Batch, Failed, Ok, PixelBudget
from beeline.errors import EmptyBody


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


def test_the_budget_bounds_what_is_held_and_lets_everybody_through() -> None:
    budget, lock = PixelBudget(100), threading.Lock()
    held, peak, served = 0, 0, 0

    def decode(pixels: int) -> None:
        nonlocal held, peak, served
        with budget.hold(pixels):
            with lock:
                held += min(pixels, 100)
                peak = max(peak, held)
            with lock:
                held -= min(pixels, 100)
                served += 1

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
