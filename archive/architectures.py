"""Networks by name: torchvision's classifiers, and timm's as `timm:NAME`, with the preprocessing that timm names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from types import ModuleType
from typing import Any

import torch
from torch import nn

from beeline.errors import ArchiveError

TIMM = "timm:"
# Both return several outputs while they train, and their published weights expect pixels that are normalised twice.
AUXILIARY = ("googlenet", "inception_v3")


def build(architecture: str, classes: int, transform_input: bool = False) -> nn.Module:
    """Return the network with random weights: float32 `[N, 3, H, W]` to logits `[N, classes]`.

    With `transform_input` the two of `AUXILIARY` change pixels that are normalised with ImageNet's numbers to -1..1, as
    torchvision does with the weights that it publishes. Both come without their auxiliary heads.

    Raises:
        ArchiveError: for an unknown name, with the nearest ones, or if timm is missing.
    """
    if architecture.startswith(TIMM):
        timm, name = _timm(architecture)
        network: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes)
        return network
    import torchvision

    models = torchvision.models
    known = models.list_models(module=models)
    if architecture not in known:
        lacks = "has as no classifier" if architecture in models.list_models() else "lacks"
        raise ArchiveError(
            f"the architecture is {architecture!r}, which torchvision {torchvision.__version__} {lacks}"
            f"{_nearest(architecture, known)}; {_of_timm(architecture)}"
        )
    options: dict[str, Any] = {}
    if architecture in AUXILIARY:
        options = {"aux_logits": False, "init_weights": False, "transform_input": transform_input}
    network = models.get_model(architecture, weights=None, num_classes=classes, **options)
    return network


def timm_preprocessing(architecture: str) -> dict[str, Any]:
    """Return timm's preprocessing of a network: its `resize`, `crop`, `interpolation`, `mean` and `std`.

    Raises:
        ArchiveError: for an unknown name, or if timm does more than to resize and to crop a square from the middle.
    """
    timm, name = _timm(architecture)
    with torch.device("meta"):
        config = timm.data.resolve_model_data_config(timm.create_model(name, pretrained=False))
    channels, height, width = config["input_size"]
    if (channels, height, config["crop_mode"]) != (3, width, "center"):
        raise ArchiveError(
            f"timm prepares pictures for {architecture} with input_size {config['input_size']} and crop_mode "
            f"{config['crop_mode']!r}; allowed: three channels, a square, 'center'; or name another --preset"
        )
    resize = int(height / config["crop_pct"])
    return {"resize": resize, "crop": height, **{key: config[key] for key in ("interpolation", "mean", "std")}}


def _timm(architecture: str) -> tuple[ModuleType, str]:
    """Return the package timm and its name of the architecture."""
    name = architecture.removeprefix(TIMM)
    try:
        import timm
    except ImportError as error:
        raise ArchiveError(f"{architecture} needs timm, which is not installed; run `make setup`") from error
    # A name may have a tag, which names its published weights and their preprocessing.
    if not timm.is_model(name) or ("." in name and name not in timm.list_pretrained()):
        lacks = f"which timm {timm.__version__} lacks{_nearest(name.partition('.')[0], timm.list_models())}"
        raise ArchiveError(f"the architecture is {architecture!r}, {lacks}; correct it")
    return timm, name


def _of_timm(architecture: str) -> str:
    """Return a clause on a name that torchvision lacks: what timm has like it."""
    try:
        import timm
    except ImportError:
        return f"if timm has it, install timm and name it {TIMM}{architecture}"
    near = _nearest(architecture, timm.list_models(), TIMM)
    return f"timm {timm.__version__} has others{near}" if near else "timm lacks it too; bring it as TorchScript"


def _nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return ` (near it: ...)`. Names are compared as the libraries write them: `google/ViT-B-16` as `vit_b_16`."""
    plain = re.sub(r"[^a-z0-9]+", "_", name.rpartition("/")[2].lower())
    near = [f"{prefix}{match}" for match in get_close_matches(plain, known, 3, 0.7)]
    return f" (near it: {', '.join(near)})" if near else ""
