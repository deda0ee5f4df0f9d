"""Any torchvision classifier by name, with a head for our labels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from beeline.errors import ConfigError
from train.model import build, check_input, head, names

FAMILIES = {"resnet18": "fc", "squeezenet1_1": "classifier.1", "mobilenet_v3_small": "classifier.3", "swin_t": "head"}
# The same, slow to build.
MORE = {
    "efficientnet_b0": "classifier.1",
    "densenet121": "classifier",
    "shufflenet_v2_x0_5": "fc",
    "mnasnet0_5": "classifier.1",
    "regnet_y_400mf": "fc",
    "convnext_tiny": "classifier.2",
    "vit_b_16": "heads.head",
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


def test_every_name_is_a_classifier_with_one_output() -> None:
    assert {"resnet18", "resnet34", "squeezenet1_1", "vit_b_16"} <= set(names())
    assert not {"inception_v3", "googlenet", "raft_large", "fcn_resnet50"} & set(names())


def test_an_unknown_name_has_its_sentence() -> None:
    with pytest.raises(ConfigError, match=r"is 'resnet81', no classifier of torchvision; did you mean 'resnet"):
        build("resnet81", 2)


def test_a_size_that_the_architecture_cannot_take_has_its_sentence() -> None:
    with pytest.raises(ConfigError, match=r"model\.crop is 192, which vit_b_16 cannot take \(Wrong image height.*224"):
        check_input(build("vit_b_16", 2), 192, "vit_b_16")


def test_the_check_leaves_the_network_as_it_was() -> None:
    network = build("resnet18", 2)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    check_input(network, 64, "resnet18")
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
