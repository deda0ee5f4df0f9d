"""The training configuration: the files under config/train, overrides, types, and a sentence for every mistake."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from beeline.errors import ConfigError, did_you_mean
from beeline.spec import INTERPOLATIONS, Geometry

FOLDER = Path(__file__).resolve().parents[1] / "config" / "train"
RECIPES = ("finetune", "scratch")
# Keys of paths, and the environment variables that override the file and not the command line.
_VARIABLES = {"data.folder": "BEELINE_DATA", "model.weights": "BEELINE_WEIGHTS"}


# Not frozen: OmegaConf fills in the fields one by one.
@dataclass
class DataConfig:
    """Which pictures."""

    folder: str | None
    held_out: float
    loaders: int


@dataclass
class ModelConfig:
    """Which architecture, from which weights, for pictures of which geometry."""

    name: str
    weights: str | None
    resize: int
    crop: int
    interpolation: str
    mean: list[float]
    std: list[float]

    @property
    def geometry(self) -> Geometry:
        """The geometry of validation and serving."""
        return Geometry(self.resize, self.crop, self.interpolation)


@dataclass
class AugmentConfig:
    """How training pictures vary."""

    scale: list[float]
    ratio: list[float]
    flip: float
    colour: float


@dataclass
class FitConfig:
    """The fixed schedule. `rate` is relative to the size of each tensor's weights."""

    recipe: str
    epochs: int
    batch: int
    rate: float
    warm_up: float
    weight_decay: float
    label_smoothing: float
    batch_norm: str
    head_penalty: float | None
    average: float | None


@dataclass
class ExportConfig:
    """What the exported model calls itself."""

    name: str | None
    version: str
    top_k: int


@dataclass
class TrainConfig:
    """The whole configuration of `beeline train`; build it with `compose`."""

    seed: int
    data: DataConfig
    model: ModelConfig
    augment: AugmentConfig
    export: ExportConfig
    fit: FitConfig

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, nested as in the file."""
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        """Write the resolved configuration as YAML."""
        path.write_text(OmegaConf.to_yaml(OmegaConf.create(self.to_dict())), encoding="utf-8")

    @property
    def archive_name(self) -> str:
        """The name under which the model is exported."""
        return self.export.name or self.model.name


def compose(
    overrides: Sequence[str] = (),
    recipe: str | None = None,
    environ: Mapping[str, str] = os.environ,
    folder: Path = FOLDER,
) -> TrainConfig:
    """Resolve the configuration: overrides, then environment, then the files in `folder`.

    Args:
        overrides: `key=value` words in Hydra's grammar, as `model.name=resnet34` or `fit=scratch`.
        recipe: the `fit` file to take unless an override names one.
        environ: the environment to read.
        folder: where `config.yaml` lies.

    Raises:
        ConfigError: for an unknown key, a value of the wrong type or an impossible one.
    """
    parsed = _parse(overrides)
    if recipe and not any(override.key_or_group == "fit" for override in parsed):
        overrides = [f"fit={recipe}", *overrides]
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            _check_keys(parsed)
            values = hydra_compose("config", list(overrides))
        given = {override.key_or_group for override in parsed}
        for key, variable in _VARIABLES.items():
            if environ.get(variable) and key not in given:
                OmegaConf.update(values, key, environ[variable])
        _check_file_keys(_flat(OmegaConf.to_container(values)))
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), values))
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(_sentence(error, overrides)) from error
    assert isinstance(config, TrainConfig)
    _check_values(config)
    return config


def load(path: Path) -> TrainConfig:
    """Read a resolved configuration, as `save` wrote it.

    Raises:
        ConfigError: when the file is damaged.
    """
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.load(path)))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} is no training configuration ({_first_line(error)}); train again") from error
    assert isinstance(config, TrainConfig)
    return config


def _parse(overrides: Sequence[str]) -> list[Override]:
    parsed = []
    for word in overrides:
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException as error:
            raise ConfigError(f"{word!r} is no override; write key=value, as model.name=resnet34") from error
        if override.type != OverrideType.CHANGE or override.is_sweep_override():
            raise ConfigError(f"{word!r} adds, deletes or sweeps; only key=value is understood, as fit.epochs=3")
        parsed.append(override)
    return parsed


def _check_keys(parsed: list[Override]) -> None:
    known = {*_leaves(TrainConfig), "fit"}
    for override in parsed:
        inside = sorted(key for key in known if key.startswith(f"{override.key_or_group}."))
        if inside and override.key_or_group != "fit":
            raise ConfigError(f"{override.key_or_group} is a group of keys; set one of them, as {inside[0]}=...")
        if override.key_or_group not in known:
            raise ConfigError(f"unknown key {override.key_or_group}{did_you_mean(override.key_or_group, known)}")
        if override.key_or_group == "fit" and override.value() not in RECIPES:
            raise ConfigError(f"fit is {override.value()!r}{did_you_mean(str(override.value()), RECIPES)}")


def _check_file_keys(found: Iterable[str]) -> None:
    """Find a misspelt key in the files themselves."""
    known = _leaves(TrainConfig)
    for key in found:
        if key not in known:
            raise ConfigError(f"unknown key {key} in the files of config/{FOLDER.name}{did_you_mean(key, known)}")


def _leaves(kind: type, prefix: str = "") -> list[str]:
    """Return the dotted names of all values of a configuration class."""
    names: list[str] = []
    for name, hint in typing.get_type_hints(kind).items():
        section = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        names += _leaves(hint, f"{prefix}{name}.") if section else [f"{prefix}{name}"]
    return names


def _flat(values: Any, prefix: str = "") -> list[str]:
    """Return the dotted names of all leaves."""
    if not isinstance(values, dict):
        return [prefix.rstrip(".")]
    return [name for key, value in values.items() for name in _flat(value, f"{prefix}{key}.")]


def _check_values(config: TrainConfig) -> None:
    """Check ranges; each line is a key, its value, whether it is valid, and what is allowed."""
    data, model, augment, fit = config.data, config.model, config.augment, config.fit
    low, high = (*augment.scale, 0.0, 0.0)[:2]
    for key, value, holds, allowed in (
        ("seed", config.seed, 0 <= config.seed < 2**32, "0 to 4294967295"),
        ("data.held_out", data.held_out, 0 < data.held_out < 1, "over 0, under 1"),
        ("data.loaders", data.loaders, 0 <= data.loaders <= 256, "0 to 256 processes"),
        ("model.crop", model.crop, 1 <= model.crop <= model.resize, f"1 to model.resize ({model.resize})"),
        ("model.resize", model.resize, model.resize <= 8192, "at most 8192 pixels"),
        ("model.interpolation", model.interpolation, model.interpolation in INTERPOLATIONS, ", ".join(INTERPOLATIONS)),
        ("model.mean", model.mean, len(model.mean) == 3, "three numbers, for red, green, blue"),
        ("model.std", model.std, len(model.std) == 3 and min(model.std) > 0, "three numbers over 0"),
        ("augment.scale", augment.scale, len(augment.scale) == 2 and 0 < low <= high <= 1, "two shares, low first"),
        (
            "augment.ratio",
            augment.ratio,
            len(augment.ratio) == 2 and min(augment.ratio) > 0,
            "two ratios over 0",
        ),
        ("augment.flip", augment.flip, 0 <= augment.flip <= 1, "0 to 1"),
        ("augment.colour", augment.colour, 0 <= augment.colour <= 1, "0 to 1"),
        ("fit.epochs", fit.epochs, 1 <= fit.epochs <= 10_000, "1 to 10000"),
        ("fit.batch", fit.batch, 1 <= fit.batch <= 65_536, "1 to 65536"),
        ("fit.rate", fit.rate, 0 < fit.rate <= 1, "over 0, at most 1"),
        ("fit.warm_up", fit.warm_up, 0 <= fit.warm_up < 1, "0 to under 1"),
        ("fit.weight_decay", fit.weight_decay, 0 <= fit.weight_decay <= 1, "0 to 1"),
        ("fit.label_smoothing", fit.label_smoothing, 0 <= fit.label_smoothing < 1, "0 to under 1"),
        ("fit.batch_norm", fit.batch_norm, fit.batch_norm in ("frozen", "learnt"), "frozen or learnt"),
        ("fit.head_penalty", fit.head_penalty, fit.head_penalty is None or fit.head_penalty > 0, "over 0, or null"),
        ("fit.average", fit.average, fit.average is None or 0 < fit.average < 1, "over 0, under 1, or null"),
        ("export.top_k", config.export.top_k, config.export.top_k >= 1, "at least 1"),
    ):
        if not holds:
            raise ConfigError(f"{key} is {value!r}; allowed: {allowed}")


def _sentence(error: Exception, overrides: Sequence[str]) -> str:
    key = getattr(error, "full_key", None)
    words = f" (given: {' '.join(overrides)})" if overrides else ""
    return f"{f'{key}: ' if key else ''}{_first_line(error)}; correct the value{words}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
