"""Networks by name: torchvision's classifiers, and timm's as `timm:NAME`, with the preprocessing that timm names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from types import ModuleType
from typing import Any

import torch
from torch import nn

from beeline.errors import ArchiveError
from beeline.spec import Geometry

TIMM = "timm:"
# Both return several outputs while they train, and their published weights expect pixels that are normalised twice.
AUXILIARY = ("googlenet", "inception_v3")


def build(architecture: str, classes: int, transform_input: bool = False, image_size: int | None = None) -> nn.Module:
    """Return the network with random weights: float32 `[N, 3, H, W]` to logits `[N, classes]`.

    With `transform_input` the two of `AUXILIARY` change pixels that are normalised with ImageNet's numbers to -1..1, as
    torchvision does with the weights that it publishes. Both come without their auxiliary heads. `image_size` is the
    side in pixels of the pictures that a ViT of torchvision takes, 224 without it. Raise `ArchiveError` for an unknown
    name, with the nearest ones, or if timm is missing.
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
        which = f"which torchvision {torchvision.__version__} {lacks}{_nearest(architecture, known)}"
        raise ArchiveError(f"the architecture is {architecture!r}, {which}; {_of_timm(architecture)}")
    options: dict[str, Any] = {"image_size": image_size} if image_size else {}
    if architecture in AUXILIARY:
        options = {"aux_logits": False, "init_weights": False, "transform_input": transform_input}
    network = models.get_model(architecture, weights=None, num_classes=classes, **options)
    return network


def timm_preprocessing(architecture: str) -> tuple[Geometry, Sequence[float], Sequence[float]]:
    """Return timm's preprocessing of a network: geometry, and `mean` and `std` of values scaled to 0..1.

    Raise `ArchiveError` for an unknown name, or if timm does what `Geometry` cannot say.
    """
    timm, name = _timm(architecture)
    with torch.device("meta"):
        config = timm.data.resolve_model_data_config(timm.create_model(name, pretrained=False))
    (channels, height, width), mode, part = (config[key] for key in ("input_size", "crop_mode", "crop_pct"))
    # In other cases timm crops a squashed picture, resizes until both sides of a rectangle are covered, or surrounds a
    # picture with the mean colour ("border").
    if channels != 3 or not {"center": width == height, "squash": part == 1}.get(mode):
        does = f"input_size {config['input_size']}, crop_mode {mode!r} and crop_pct {part}"
        allowed = "three channels, and 'center' with a square or 'squash' with crop_pct 1; name another --preset"
        raise ArchiveError(f"timm prepares pictures for {architecture} with {does}; allowed: {allowed}")
    fit, wide = mode.replace("center", "crop"), None if width == height else width
    geometry = Geometry(int(height / part), height, config["interpolation"], fit=fit, width=wide)
    return geometry, config["mean"], config["std"]


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
