"""The store of thirty models: six architectures with labels of their own, and the same weights every time."""

from __future__ import annotations

import torch

from bench.studies.thirty import ARCHITECTURES, COPIES, _network


def test_thirty_archives_are_of_six_architectures_with_different_numbers_of_labels() -> None:
    assert COPIES * len(ARCHITECTURES) == 30
    assert len(set(ARCHITECTURES.values())) == len(ARCHITECTURES) == 6


def test_weights_are_the_same_every_time_and_differ_between_networks() -> None:
    first, again, other = (_network("squeezenet1_1", classes) for classes in (5, 5, 6))
    assert all(torch.equal(one, two) for one, two in zip(first.parameters(), again.parameters(), strict=True))
    (weights, others) = (next(network.parameters()) for network in (first, other))
    assert not torch.equal(weights, others)
