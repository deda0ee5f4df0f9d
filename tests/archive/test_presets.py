"""Presets: known ones, torchvision's own, overrides, and sentences for the rest."""

from __future__ import annotations

import pytest
import torchvision

from archive import presets
from beeline.errors import ArchiveError
from beeline.spec import Geometry


def test_imagenet_is_what_torchvision_gives_its_first_resnets() -> None:
    own = presets.find_preset("ResNet18_Weights.IMAGENET1K_V1")
    imagenet = presets.find_preset("imagenet")
    assert (imagenet.geometry, imagenet.mean, imagenet.std) == (own.geometry, own.mean, own.std)


def test_torchvision_reads_the_geometry_of_the_architectures_default_weights() -> None:
    found = presets.find_preset("torchvision", "swin_t")
    transform = torchvision.models.Swin_T_Weights.DEFAULT.transforms()
    assert found.geometry == Geometry(transform.resize_size[0], transform.crop_size[0], "bicubic")


def test_an_override_wins_and_leaves_the_rest() -> None:
    found = presets.find_preset("imagenet").override(resize=72, crop=64, mean=[0, 0, 0])
    assert found.geometry == Geometry(72, 64, "bilinear")
    assert found.mean == (0.0, 0.0, 0.0)
    assert found.std == presets.IMAGENET_STD


@pytest.mark.parametrize(
    ("name", "architecture", "told"),
    [
        ("imagnet", None, "did you mean 'imagenet'"),
        ("torchvision", None, "needs an architecture"),
        ("torchvision", "resnet1000", "resnet1000"),
        ("ResNet18_Weights.V9", None, "ResNet18_Weights.V9"),
        ("torchvision", "fcn_resnet50", "fcn_resnet50"),
    ],
)
def test_an_unknown_preset_is_one_sentence_with_the_fix(name: str, architecture: str | None, told: str) -> None:
    with pytest.raises(ArchiveError, match=told):
        presets.find_preset(name, architecture)


def test_a_deviation_of_nothing_is_refused() -> None:
    with pytest.raises(ArchiveError, match=r"std is .*over 0"):
        presets.find_preset("unit").override(std=[1, 0, 1])
    with pytest.raises(ArchiveError, match=r"mean is .*three numbers"):
        presets.find_preset("unit").override(mean=[1, 0])
