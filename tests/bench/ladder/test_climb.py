"""Where the ladder ends, and its knee, on rows that a test made up."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.ladder.climb import climb, flat, knee
from bench.ladder.row import OUT_OF_MEMORY, STAGES, Row, Timing


def row(batch: int, per_image: float, handler: float | None = None) -> Row:
    """Return a row with these milliseconds for one image."""
    each = dict.fromkeys(STAGES, per_image) | {"handler": per_image if handler is None else handler}
    return Row(batch, {stage: Timing(ms * batch, ms * batch, ms * batch, ms) for stage, ms in each.items()}, 7)


def measured(a: float, b: float, fits: int = 1 << 20) -> Callable[[int], Row]:
    """Return a fake measurement after milliseconds(n) = a * n + b; more than `fits` is out of memory."""
    return lambda batch: row(batch, a + b / batch) if batch <= fits else Row(batch, {}, error=OUT_OF_MEMORY)


def test_it_doubles_until_two_doublings_gained_next_to_nothing() -> None:
    rows, ended = climb(measured(a=10, b=20), least=1, most=1024)
    assert ended == "plateau"
    # 30, 20, 15, 12.5, 11.25, 10.63, 10.31, 10.16: the last two doublings gain 2.9 % and 1.5 %.
    assert [each.batch for each in rows] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert flat(rows)
    assert not flat(rows[:-1])


def test_a_plateau_before_the_least_batch_size_ends_nothing() -> None:
    rows, ended = climb(measured(a=10, b=0), least=64, most=256)
    assert (rows[-1].batch, ended) == (64, "plateau")


def test_the_forward_pass_may_still_gain_where_the_handler_does_not() -> None:
    falling = [row(1, 20, 30), row(2, 15, 30), row(4, 12, 30)]
    assert not flat(falling)


def test_getting_worse_is_no_gain() -> None:
    assert flat([row(1, 10), row(2, 11), row(4, 12)])


def test_out_of_memory_ends_it_and_its_row_is_kept() -> None:
    seen: list[Row] = []
    rows, ended = climb(measured(a=1, b=100, fits=4), least=1, most=256, watch=seen.append)
    assert [(each.batch, each.error) for each in rows] == [(1, None), (2, None), (4, None), (8, OUT_OF_MEMORY)]
    assert ended == OUT_OF_MEMORY
    assert seen == list(rows)
    assert knee(rows) == 4


def test_most_ends_it() -> None:
    rows, ended = climb(measured(a=1, b=100), least=1, most=6)
    assert [each.batch for each in rows] == [1, 2, 4]
    assert ended == "largest batch asked for (6)"


def test_the_knee_is_the_smallest_batch_near_the_cheapest_image() -> None:
    assert knee([row(1, 20), row(2, 12), row(4, 10.4), row(8, 10), row(16, 10.9)]) == 4


def test_without_a_row_there_is_no_knee() -> None:
    assert knee([Row(1, {}, error=OUT_OF_MEMORY)]) is None


@pytest.mark.parametrize(("samples", "median", "low", "high"), [([4.0], 4, 4, 4), ([1.0, 2.0, 3.0, 4.0, 5.0], 3, 2, 4)])
def test_a_timing_is_median_and_quartiles(samples: list[float], median: float, low: float, high: float) -> None:
    assert Timing.of(samples, 2) == Timing(median, low, high, median / 2)
