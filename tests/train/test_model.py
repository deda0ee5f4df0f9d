"""Any torchvision classifier by name, with a head for our labels that is solved for on frozen features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.transforms import v2

from archive.artifact import read_weights
from beeline.errors import ArchiveError, ConfigError
from train.config import compose
from train.model import Batch, build, check_input, guess_under, head, normalised, solve_head, tallied

CONFIG = compose(environ={})

FAMILIES = {"resnet18": "fc", "squeezenet1_1": "classifier.1", "mobilenet_v3_small": "classifier.3"}
# More families, which are slow to build.
MORE = {
    "efficientnet_b0": "classifier.1",
    "densenet121": "classifier",
    "shufflenet_v2_x0_5": "fc",
    "mnasnet0_5": "classifier.1",
    "regnet_y_400mf": "fc",
    "convnext_tiny": "classifier.2",
    "vit_b_16": "heads.head",
    "swin_t": "head",
    "resnet101": "fc",
}


@pytest.mark.parametrize(
    ("name", "expected"), [*FAMILIES.items(), *(pytest.param(*pair, marks=pytest.mark.train) for pair in MORE.items())]
)
def test_the_head_is_found_and_makes_the_logits(name: str, expected: str) -> None:
    network = build(name, 3).eval()
    found, layer = head(network)
    assert found == expected
    assert layer.weight.shape[0] == 3
    seen: list[torch.Tensor] = []
    layer.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.inference_mode():
        logits = network(torch.zeros(2, 3, 224, 224))
    assert logits.shape == (2, 3)
    # SqueezeNet clips and averages its head's maps; everywhere else they are the logits themselves.
    made = seen[0].relu().mean((2, 3)) if isinstance(layer, nn.Conv2d) else seen[0]
    assert torch.equal(logits, made)


def test_a_head_of_timm_is_the_one_that_timm_names() -> None:
    network = build("timm:efficientnet_b0", 3)
    name, layer = head(network)
    assert (name, layer) == ("classifier", network.get_submodule(name))
    with pytest.raises(ConfigError, match="VisionTransformerDistilled has no single head"):
        head(build("timm:deit_tiny_distilled_patch16_224", 3))


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_a_network_with_auxiliary_heads_has_its_sentence(name: str) -> None:
    with pytest.raises(ConfigError, match=f"model.name is '{name}', which returns several outputs"):
        build(name, 2)


def test_a_size_that_the_architecture_cannot_take_has_its_sentence() -> None:
    with pytest.raises(ConfigError, match=r"model\.crop is 192, which vit_b_16 cannot take \(Wrong image height.*224"):
        check_input(build("vit_b_16", 2), (192, 192), "vit_b_16")


def test_the_check_leaves_the_network_as_it_was() -> None:
    network = build("resnet18", 2)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    check_input(network, (64, 48), "resnet18")
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_weights_of_another_size_of_picture_have_their_sentence(tmp_path: Path) -> None:
    state = models.vit_b_16(image_size=64, num_classes=2).state_dict()
    torch.save(state, tmp_path / "small.pth")
    with pytest.raises(ArchiveError, match=r"'encoder\.pos_embedding' of shape \[1, 17, 768\], vit_b_16 has \[1, 197"):
        read_weights(tmp_path / "small.pth", "vit_b_16").start(build("vit_b_16", 2))


def test_normalising_is_that_of_torchvision() -> None:
    pictures = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = CONFIG.model.mean, CONFIG.model.std
    steps = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    assert torch.allclose(normalised(pictures, mean, std), steps(pictures), atol=1e-5)


@pytest.fixture
def batches() -> list[Batch]:
    """Dark pictures are of class 0, bright ones of class 1."""
    random = torch.Generator().manual_seed(0)
    truths = torch.tensor([0, 1] * 8)
    pictures = torch.randint(0, 100, (16, 3, 64, 64), generator=random) + 100 * truths.view(-1, 1, 1, 1)
    return list(zip(pictures.to(torch.uint8).split(5), truths.split(5), strict=True))


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_the_head_is_solved_for_and_the_body_stays(name: str, batches: list[Batch]) -> None:
    torch.manual_seed(0)
    network = build(name, 2)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    solved = solve_head(network, batches, 1e-3, CONFIG.model)
    assert (solved.accuracy, solved.pictures) == (1.0, 32), "each picture and its mirror image"
    measured = tallied(network, batches, CONFIG.model)
    assert (measured.accuracy, measured.pictures) == (1.0, 16)
    assert measured.loss == pytest.approx(solved.loss, rel=0.2)
    network.eval()
    with torch.inference_mode():
        for pictures, truths in batches:
            planes = normalised(pictures, CONFIG.model.mean, CONFIG.model.std)
            assert torch.equal(network(planes).argmax(1), truths)
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"{head(network)[0]}.{kind}" for kind in ("weight", "bias")}


def test_the_solution_is_the_minimum_wherever_it_starts_and_smaller_under_a_penalty(batches: list[Batch]) -> None:
    """At the minimum of a convex loss its gradient is zero."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    network, layer = nn.Sequential(*layers), layers[-1]
    sizes, weights = [], []
    for penalty in (0.1, 0.1, 10.0):
        nn.init.normal_(layer.weight)
        solve_head(network, batches, penalty, CONFIG.model, mirrored=False)
        weights.append(layer.weight.detach().clone())
        sizes.append(float(weights[-1].norm()))
        mean, std = CONFIG.model.mean, CONFIG.model.std
        logits, truths = zip(*((network(normalised(x, mean, std)), y) for x, y in batches), strict=True)
        size = layer.weight.square().sum()
        loss = nn.functional.cross_entropy(torch.cat(logits), torch.cat(truths)) + penalty / 2 * size
        assert torch.autograd.grad(loss, layer.weight)[0].abs().max() < 1e-4
    assert torch.allclose(weights[0], weights[1], atol=1e-6)
    assert sizes[0] > sizes[2]


def test_with_weights_a_rare_class_counts_as_much_as_a_frequent_one(batches: list[Batch]) -> None:
    """The solution for a class twice in the data is that for a class once which counts twice."""
    (pictures, truths), *_ = batches
    twice = torch.cat([pictures, pictures[truths == 1]]), torch.cat([truths, truths[truths == 1]])
    torch.manual_seed(0)
    first, second = (build("squeezenet1_1", 2) for _ in range(2))
    second.load_state_dict(first.state_dict())
    solve_head(first, [twice], 0.1, CONFIG.model, False)
    solve_head(second, [(pictures, truths)], 0.1, CONFIG.model, False, torch.tensor([1.0, 2.0]))
    one, other = (head(network)[1].weight for network in (first, second))
    assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(
    ("answered", "score"),
    [
        ([(0.5 + i / 100, i >= 10 or i % 2 == 0) for i in range(50)], 0.59),
        ([(0.5 + i / 100, True) for i in range(50)], None),
        ([(0.5 + i / 100, i % 2 == 0) for i in range(50)], 1.0),
        ([(0.9, False)] * 19, None),
    ],
)
def test_a_guess_is_a_score_under_which_fewer_than_three_of_four_are_right(
    answered: list[tuple[float, bool]], score: float | None
) -> None:
    """Where no such score is seen, or too few pictures, there is none."""
    assert guess_under(answered) == (None if score is None else pytest.approx(score, abs=0.011))
