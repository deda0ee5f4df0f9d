"""What a training run will do, and its fingerprint, found without importing anything heavy."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import PIL

from beeline import pixels
from beeline.errors import ConfigError
from train import config as configuration
from train import data as pictures
from train import weights as starting
from train.config import TrainConfig
from train.data import DataSet
from train.progress import Say
from train.weights import Weights

# The version of data, fit, headstart, learner, loader and model: raise it when the same plan gives another model. A
# finished run of another version is not reused.
RECIPE = 1
_PACKAGES = ("torch", "torchvision", "lightning")


@dataclass(frozen=True)
class Plan:
    """A planned run: resolved configuration, pictures, starting weights, and why `config.fit.recipe` was chosen."""

    config: TrainConfig
    data: DataSet
    weights: Weights
    reason: str

    @property
    def fingerprint(self) -> str:
        """The sha256 over configuration, pictures, weights and the versions of the code that shapes a run.

        It leaves out paths, and what changes only the export or the speed.
        """
        values = self.config.to_dict()
        del values["export"], values["data"]["folder"], values["data"]["loaders"], values["model"]["weights"]
        parts = {
            "config": values,
            "labels": self.data.labels,
            "data": self.data.digest,
            "weights": self.weights.sha256,
            "recipe": RECIPE,
            "geometry": pixels.GEOMETRY,
            # PIL may come from another package, Pillow-SIMD.
            "packages": {**{name: version(name) for name in _PACKAGES}, "pillow": PIL.__version__},
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def plan(
    overrides: Sequence[str],
    say: Say,
    cache: Path = pictures.CACHE,
    environ: Mapping[str, str] = os.environ,
    generated: bool = False,
) -> Plan:
    """Resolve the configuration, find pictures and weights, and choose the recipe by the weights.

    With `generated` the pictures are drawn, and no others are looked for.

    Raises:
        ConfigError: for a mistake in an override or a file, or two sources of pictures. DataError, DownloadError,
            WeightsError: for pictures or weights that were named and cannot be used.
    """
    config = configuration.compose(overrides, environ=environ)
    if generated and any(word.startswith("data.folder=") for word in overrides):
        raise ConfigError("generated pictures and a folder of pictures are both asked for; leave one out")
    if config.fit.recipe == "scratch":
        weights, reason = Weights("random", "none (random initialisation)"), "fit=scratch was asked for"
    else:
        weights = starting.find_weights(config.model.name, _path(config.model.weights), say, environ)
        reason = f"there are weights to start from ({weights.name})"
        if not weights.pretrained:
            config = configuration.compose(overrides, "scratch", environ)
            reason = "there are no weights to start from"
    data = pictures.find_data(_path(config.data.folder), say, config.data.held_out, cache, environ, generated)
    say(f"recipe: {config.fit.recipe}, because {reason}")
    return Plan(config, data, weights, reason)


def _path(text: str | None) -> Path | None:
    return Path(text).expanduser() if text else None
