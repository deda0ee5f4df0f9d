"""Any torchvision classifier by name, with a head for our labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models

from archive.artifact import read_state_dict
from beeline.errors import ConfigError
from train.errors import WeightsError
from train.model import build, check_input, head, names, start_from

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
        check_input(build("vit_b_16", 2), (192, 192), "vit_b_16")


def test_the_check_leaves_the_network_as_it_was() -> None:
    network = build("resnet18", 2)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    check_input(network, (64, 48), "resnet18")
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_the_body_is_loaded_and_the_head_left_alone(random_weights: Path) -> None:
    network, state = build("squeezenet1_1", 2), read_state_dict(random_weights)
    before = network.state_dict()["classifier.1.weight"].clone()
    start_from(network, state, "the file")
    assert torch.equal(network.state_dict()["features.0.weight"], state["features.0.weight"])
    assert torch.equal(network.state_dict()["classifier.1.weight"], before)


def test_weights_of_another_architecture_or_size_have_their_sentence(random_weights: Path) -> None:
    with pytest.raises(WeightsError, match=r"does not fit ResNet: \d+ missing \(bn1\.bias.*; \d+ unknown") as caught:
        start_from(build("resnet18", 2), read_state_dict(random_weights), "the file")
    assert str(caught.value).endswith("set model.name to the architecture that the file was made for")
    assert "\n" not in str(caught.value)
    small, large = (models.VisionTransformer(side, 16, 1, 1, 8, 8, num_classes=2) for side in (32, 64))
    with pytest.raises(WeightsError, match=r"VisionTransformer: 1 of another shape \(encoder\.pos_embedding\)"):
        start_from(large, small.state_dict(), "it")
