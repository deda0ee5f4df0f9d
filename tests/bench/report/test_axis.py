"""Axes: where values lie, and round ticks that include what is drawn."""

from __future__ import annotations

import pytest

from bench.report.axis import Axis


@pytest.mark.parametrize(
    ("most", "high", "ticks"),
    [(7.3, 8, 5), (150, 150, 7), (1, 1, 6), (0.04, 0.04, 5), (0, 1, 6), (12_345, 12_500, 6)],
)
def test_a_linear_axis_begins_at_0_and_ends_at_a_round_number(most: float, high: float, ticks: int) -> None:
    axis = Axis.linear("", [most])
    assert (axis.low, axis.high) == (0, pytest.approx(high))
    assert len(axis.ticks) == ticks
    assert (axis.at(0), axis.at(axis.high), axis.at(axis.high / 2)) == (0, 1, pytest.approx(0.5))


def test_batch_sizes_have_ticks_at_powers_of_two() -> None:
    axis = Axis.powers("", [1, 8, 256])
    assert axis.ticks == (1, 2, 4, 8, 16, 32, 64, 128, 256)
    assert 0 < axis.at(1) < axis.at(2) < axis.at(256) < 1
    assert axis.at(4) - axis.at(2) == pytest.approx(axis.at(256) - axis.at(128))


@pytest.mark.parametrize("values", [[1.02, 17.5], [0.3, 4000], [10, 11], [99], [500, 501]])
def test_a_logarithmic_axis_has_ticks_and_room_for_its_values(values: list[float]) -> None:
    axis = Axis.decades("", values)
    assert all(0 < axis.at(value) < 1 for value in values)
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
    assert 1 <= len(axis.ticks) <= 10


def test_without_a_value_there_is_an_axis_all_the_same() -> None:
    for axis in (Axis.linear("", []), Axis.powers("", []), Axis.decades("", [])):
        assert axis.low < axis.high


def test_what_lies_outside_is_drawn_at_the_edge() -> None:
    assert Axis.linear("", [10]).at(99) == 1
    assert Axis.decades("", [10, 100]).at(0) == 0
