"""Any torchvision classifier by name, with a head for our labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models

from archive.artifact import read_weights
from beeline.errors import ArchiveError, ConfigError
from train.model import build, check_input, head

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
