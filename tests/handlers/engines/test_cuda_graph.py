"""Recordings by size: a batch is cut, padded and put together again; the recordings themselves need a device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from beeline.engines.cuda_graph import BUCKETS, CudaGraphs, by_buckets


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [1]), (2, [2]), (5, [8]), (64, [64]), (65, [64, 1]), (150, [64, 64, 32])]
)
def test_a_batch_is_cut_into_recorded_sizes(count: int, expected: list[int]) -> None:
    buckets = []

    def replay(bucket: int, pixels: Tensor) -> Tensor:
        buckets.append(bucket)
        return torch.cat([pixels, torch.zeros(bucket - len(pixels), 1)])

    assert torch.equal(by_buckets(torch.arange(1.0, count + 1)[:, None], replay)[:, 0], torch.arange(1.0, count + 1))
    assert buckets == expected


def test_what_a_replay_overwrites_was_copied_and_padding_is_cut_off() -> None:
    memory = {size: torch.full((size, 2), -1.0) for size in BUCKETS}

    def replay(bucket: int, pixels: Tensor) -> Tensor:
        memory[bucket][: len(pixels)] = pixels.float()
        return memory[bucket]

    for count in (1, 3, 64, 131):
        pixels = torch.arange(2 * count, dtype=torch.int32).reshape(count, 2)
        first = by_buckets(pixels, replay)
        assert torch.equal(first, pixels.float())
        by_buckets(pixels + 1000, replay)
        assert torch.equal(first, pixels.float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is there")
def test_recordings_answer_as_the_model_itself() -> None:
    device = torch.device("cuda:0")
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1))
    network = layers.to(device).eval()

    def model(pixels: Tensor) -> Tensor:
        scores: Tensor = network(pixels.permute(0, 3, 1, 2).float() / 255).flatten(1)
        return scores

    with torch.inference_mode():
        graphs = CudaGraphs(model, device, 32)
        for count in (1, 2, 5, 64, 70):
            pixels = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, device=device)
            found = graphs(pixels)
            kept = found.clone()
            graphs(255 - pixels)
            assert torch.equal(found, kept)
            assert torch.allclose(found, model(pixels), atol=1e-4)
