"""The line through a ladder, and the sentences on the users' two references beside it."""

from __future__ import annotations

import pytest

from bench.ladder.fit import fit
from bench.ladder.reference import REFERENCES, Reference, differences
from bench.ladder.row import OUT_OF_MEMORY, Row
from tests.bench.ladder.test_climb import measured, row


def test_a_line_is_found_again() -> None:
    line = fit([(n, 12.5 * n + 40) for n in (1, 2, 8, 64)])
    assert line is not None
    assert (line.a_ms, line.b_ms, line.error) == (pytest.approx(12.5), pytest.approx(40), pytest.approx(0, abs=1e-9))
    assert line.images_lost == pytest.approx(3.2)


def test_the_error_is_the_largest_relative_difference() -> None:
    line = fit([(1, 10.0), (2, 20.0), (4, 60.0)])
    assert line is not None
    shares = [(line.a_ms * n + line.b_ms) / y - 1 for n, y in ((1, 10), (2, 20), (4, 60))]
    assert line.error == pytest.approx(max(map(abs, shares)))


def test_one_batch_size_has_no_line() -> None:
    assert fit([(4, 10.0), (4, 11.0)]) is None


def test_the_references_are_what_users_reported() -> None:
    assert [one.to_dict() for one in REFERENCES] == [
        {
            "what": "ResNet-18, reported by users",
            "unit": "ms per image",
            "points": [[8, 17.5], [32, 13.75]],
            "worse_at": 64,
        },
        {
            "what": "ResNet-101, reported by users",
            "unit": "ms per image",
            "points": [[1, 2.75], [256, 1.02]],
            "worse_at": None,
        },
    ]


def sizes(a: float, b: float, most: int = 64) -> list[Row]:
    return [measured(a, b)(1 << i) for i in range(most.bit_length())]


def test_a_reference_with_more_fixed_cost_is_told_apart() -> None:
    resnet18, resnet101, rest = differences(sizes(a=20, b=2))
    assert "an image gets 1.27 times faster from batch 8 to 32 and is worse at 64" in resnet18
    assert "40 ms fixed (as much as 3.2 images) and 12.5 ms an image" in resnet18
    assert "one of ours 2 ms fixed (as much as 0.1 images) and 20 ms an image" in resnet18
    assert resnet18.endswith("only that is spread over more images, and it makes ours no faster.")
    # Ours ends at 64, which is nearest to their 256.
    assert "our forward pass gets 1.10 times faster from 1 to 64, best at 64" in resnet101
    assert "0 ms (0%) are outside the forward pass" in rest


def test_a_ladder_like_the_reference_is_called_alike() -> None:
    sentence = differences(sizes(a=12.5, b=40), [Reference("X", ((8, 17.5), (32, 13.75)))])[0]
    assert sentence.endswith("the shapes are alike.")


def test_a_ladder_that_gains_more_says_how_much() -> None:
    sentence = differences(sizes(a=1, b=100), [Reference("X", ((1, 2.75), (64, 2.5)))])[0]
    assert sentence.endswith("and it makes ours 39.41 times faster.")


def test_a_shape_that_no_fixed_cost_explains_says_so() -> None:
    # The images get dearer with the batch: no line with a fixed cost does that.
    rows = [row(1, 10), row(2, 10), row(4, 10), row(8, 16), row(16, 20), row(32, 24)]
    sentence = differences(rows, [Reference("X", ((8, 10.0), (32, 10.0)))])[0]
    assert "an image gets no faster from batch 8 to 32" in sentence
    assert "our forward pass gets 1.50 times slower from 8 to 32, best at 1 and worse at 8" in sentence
    assert "one of ours nothing fixed that could be seen" in sentence
    assert "What is left of the difference changes with the batch size" in sentence


def test_a_short_ladder_is_not_compared() -> None:
    assert "only batch 4 in that range" in differences(sizes(a=1, b=1, most=4))[0]
    assert differences([row(1, 10), Row(2, {}, error=OUT_OF_MEMORY)]) == [
        "Ours has fewer than two batch sizes, so there is no shape to compare."
    ]
