"""Any torchvision classifier by name, with a head for the given labels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchvision import models

from beeline.errors import ConfigError, did_you_mean, short
from train.errors import WeightsError

# Both return several outputs while they train, and their published weights expect pixels that are normalised twice: too
# many special cases.
_LEFT_OUT = {"googlenet", "inception_v3"}
_NAMED = 3


def names() -> list[str]:
    """Return the names of the architectures that can be trained."""
    return [name for name in models.list_models(module=models) if name not in _LEFT_OUT]


def build(name: str, classes: int) -> nn.Module:
    """Return the architecture with random weights: float32 `[N, 3, H, W]` to logits `[N, classes]`."""
    known = names()
    if name not in known:
        raise ConfigError(f"model.name is {name!r}, no classifier of torchvision{did_you_mean(name, known)}")
    network: nn.Module = models.get_model(name, weights=None, num_classes=classes)
    return network


def head(network: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    """Return the layer that makes the logits, with its dotted name: the last linear or convolutional layer.

    In every torchvision classifier that is `fc`, `classifier.<n>`, `heads.head` or `head`.
    """
    return [(name, layer) for name, layer in network.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))][-1]


def start_from(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load every weight except the head's, which is for other labels; all other names and shapes must match.

    Raises:
        WeightsError: for another architecture's weights; the message has the first names that differ.
    """
    name, _ = head(network)
    own, given = (
        {key: value for key, value in weights.items() if not key.startswith(f"{name}.")}
        for weights in (network.state_dict(), state)
    )
    missing, odd = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    shapes = sorted(key for key in own.keys() & given.keys() if own[key].shape != given[key].shape)
    faults = [
        f"{len(keys)} {what} ({', '.join(keys[:_NAMED])}{', ...' if len(keys) > _NAMED else ''})"
        for what, keys in (("missing", missing), ("unknown", odd), ("of another shape", shapes))
        if keys
    ]
    if faults:
        raise WeightsError(
            f"{source} does not fit {type(network).__name__}: {'; '.join(faults)}; "
            "set model.name to the architecture that the file was made for"
        )
    network.load_state_dict({**network.state_dict(), **given})


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
