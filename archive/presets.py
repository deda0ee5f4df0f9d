"""Preprocessing presets: the geometry and photometry that a ready-made model was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from beeline.errors import ArchiveError, did_you_mean
from beeline.spec import Geometry

RGB = tuple[float, float, float]
IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
IMAGENET_STD: RGB = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preset:
    """Geometry in pixels; `mean` and `std` per RGB channel, of values scaled to 0..1."""

    geometry: Geometry
    mean: RGB
    std: RGB

    def override(
        self,
        resize: int | None = None,
        crop: int | None = None,
        interpolation: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> Preset:
        """Return the preset with each value that is given instead of its own.

        Raises:
            ArchiveError: when `mean` or `std` are not three numbers, or a deviation is not over 0.
        """
        sizes: dict[str, Any] = {"resize": resize, "crop": crop, "interpolation": interpolation}
        return Preset(
            replace(self.geometry, **{key: value for key, value in sizes.items() if value is not None}),
            rgb("mean", self.mean if mean is None else mean),
            rgb("std", self.std if std is None else std),
        )


_PRESETS = {
    # The evaluation transform of most ImageNet models.
    "imagenet": Preset(Geometry(256, 224), IMAGENET_MEAN, IMAGENET_STD),
    # Pixels scaled to -1..1, as TensorFlow models take them.
    "half": Preset(Geometry(256, 224), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    # Pixels scaled to 0..1 and no more.
    "unit": Preset(Geometry(256, 224), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    # OpenAI's CLIP image encoders.
    "clip": Preset(
        Geometry(224, 224, "bicubic"), (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    ),
}


def find_preset(name: str, architecture: str | None = None) -> Preset:
    """Return the preset `name`.

    Args:
        name: `imagenet`, `half`, `unit` or `clip`; `torchvision` for what the default weights of `architecture`
            take; or a torchvision weights name such as `ResNet50_Weights.IMAGENET1K_V2`. Nothing is downloaded.
        architecture: a torchvision model's name, for `torchvision`.

    Raises:
        ArchiveError: for a name or architecture that is not known.
    """
    if name in _PRESETS:
        return _PRESETS[name]
    if name == "torchvision" or "." in name:
        return _from_torchvision(name, architecture)
    raise ArchiveError(f"the preset is {name!r}{did_you_mean(name, (*_PRESETS, 'torchvision'))}")


def rgb(key: str, values: Sequence[float]) -> RGB:
    """Check three channel values; a deviation must be over 0.

    Raises:
        ArchiveError: naming the key and its values.
    """
    if len(values) != 3 or (key == "std" and min(values) <= 0):
        allowed = "three numbers" if key == "mean" else "three numbers over 0"
        raise ArchiveError(f"{key} is {list(values)}; allowed: {allowed}, one for each of R, G and B, as 0.5,0.5,0.5")
    return (float(values[0]), float(values[1]), float(values[2]))


def _from_torchvision(name: str, architecture: str | None) -> Preset:
    import torchvision

    if name == "torchvision" and architecture is None:
        raise ArchiveError("the preset 'torchvision' needs an architecture; add --architecture, as resnet18")
    try:
        if name == "torchvision":
            weights = torchvision.models.get_model_weights(architecture).DEFAULT
        else:
            weights = torchvision.models.get_weight(name)
        transform = weights.transforms()
        geometry = Geometry(transform.resize_size[0], transform.crop_size[0], transform.interpolation.value)
        return Preset(geometry, rgb("mean", transform.mean), rgb("std", transform.std))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        asked = architecture if name == "torchvision" else name
        raise ArchiveError(
            f"torchvision knows no classification preprocessing for {asked!r} "
            f"({error}); give --resize, --crop, --mean and --std with --preset imagenet"
        ) from error
