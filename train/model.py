"""Any classifier of torchvision or timm by name, with a head for the given labels."""

from __future__ import annotations

import torch
from torch import nn

from archive import architectures
from beeline.errors import ConfigError, short


def build(name: str, classes: int) -> nn.Module:
    """Return the architecture with random weights: float32 `[N, 3, H, W]` to logits `[N, classes]`."""
    if name in architectures.AUXILIARY:
        raise ConfigError(f"model.name is {name!r}, which returns several outputs while it trains; take another")
    return architectures.build(name, classes)


def head(network: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    """Return the layer that makes the logits, with its dotted name: the last linear or convolutional layer.

    In every torchvision classifier that is `fc`, `classifier.<n>`, `heads.head` or `head`. Those of timm name it.
    """
    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    classifier = getattr(network, "get_classifier", lambda: layers[-1][1])()
    for name, layer in layers:
        if layer is classifier:
            return name, layer
    raise ConfigError(f"{type(network).__name__} has no single head, so it cannot be trained; take another")


def check_input(network: nn.Module, shape: tuple[int, int], name: str) -> None:
    """Run one empty picture through the network; raise `ConfigError` if it cannot take one of this height and width."""
    training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            network(torch.zeros(1, 3, *shape))
    except (AssertionError, RuntimeError, ValueError) as error:
        high, wide = shape
        crop = f"model.crop is {high}" + ("" if wide == high else f" and model.width {wide}")
        raise ConfigError(f"{crop}, which {name} cannot take ({short(error)}); most take 224") from error
    finally:
        network.train(training)
