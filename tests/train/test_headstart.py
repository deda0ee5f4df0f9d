"""The head that is solved for: the best one, the same one, and the only thing that changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from train.headstart import solve
from train.learner import normalised
from train.model import build, head

MEAN, STD = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]
Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture
def batches() -> Batches:
    """Dark pictures are of class 0, bright ones of class 1."""
    random = torch.Generator().manual_seed(0)
    truths = torch.tensor([0, 1] * 8)
    pictures = torch.randint(0, 100, (16, 3, 64, 64), generator=random) + 100 * truths.view(-1, 1, 1, 1)
    return list(zip(pictures.to(torch.uint8).split(5), truths.split(5), strict=True))


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_the_head_learns_and_the_body_stays(name: str, batches: Batches) -> None:
    torch.manual_seed(0)
    network = build(name, 2)
    label, _ = head(network)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    accuracy = solve(network, batches, 1e-3, MEAN, STD)
    assert accuracy == 1.0
    network.eval()
    with torch.inference_mode():
        for pictures, truths in batches:
            assert torch.equal(network(normalised(pictures, MEAN, STD)).argmax(1), truths)
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"{label}.weight", f"{label}.bias"}


def small() -> nn.Module:
    """A network of one random convolution, quick to run."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


def test_the_solution_does_not_depend_on_how_the_head_was(batches: Batches) -> None:
    network = small()
    solve(network, batches, 0.1, MEAN, STD)
    first = head(network)[1].weight.detach().clone()
    nn.init.normal_(head(network)[1].weight)
    solve(network, batches, 0.1, MEAN, STD)
    assert torch.allclose(first, head(network)[1].weight, atol=1e-6)


def test_the_solution_is_a_minimum(batches: Batches) -> None:
    """At the minimum of a convex loss its gradient is zero."""
    network = small()
    solve(network, batches, 0.1, MEAN, STD, mirrored=False)
    layer = head(network)[1]
    logits, truths = zip(*((network(normalised(x, MEAN, STD)), y) for x, y in batches), strict=True)
    loss = nn.functional.cross_entropy(torch.cat(logits), torch.cat(truths)) + 0.05 * layer.weight.square().sum()
    gradient = torch.autograd.grad(loss, layer.weight)[0]
    assert gradient.abs().max() < 1e-4


def test_a_stronger_penalty_gives_a_smaller_head(batches: Batches) -> None:
    sizes = []
    for penalty in (1e-3, 1e-1, 10.0):
        network = small()
        solve(network, batches, penalty, MEAN, STD)
        sizes.append(float(head(network)[1].weight.detach().norm()))
    assert sizes[0] > sizes[1] > sizes[2]
