"""The training configuration: the files in config/train, overrides, types, and a sentence for every mistake."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass
from yaml import YAMLError

from beeline.errors import ConfigError, did_you_mean
from beeline.spec import FITS, INTERPOLATIONS, NAME, NAMES, Geometry

FOLDER = Path(__file__).resolve().parents[1] / "config" / "train"
# Those of `beeline train --quick`, as an archive's card names them.
QUICK = {
    "head": "quick: only the head was fitted, on frozen features",
    "small": "quick: trained from nothing on small pictures",
}
RECIPES = ("finetune", "scratch", *QUICK)
# Keys of paths, and their environment variables, which override the file but not the command line.
_EXPERIMENT = "experiment"
_VARIABLES = {"data.folder": "BEELINE_DATA", "model.weights": "BEELINE_WEIGHTS"}
# For YAML a version such as 1.0 and a folder such as 2024 are numbers. "3" and true are no numbers.
_STRICT = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)
_Number = Annotated[float, Field(strict=True)]
_Positive = Annotated[float, Field(strict=True, gt=0)]
_Share = Annotated[float, Field(strict=True, gt=0, le=1)]


def _is(allowed: str, **bounds: Any) -> Any:
    """Return a field; `allowed` is for the error's sentence what `bounds` are for pydantic."""
    return Field(description=allowed, **bounds)


def _number(allowed: str, **bounds: Any) -> Any:
    return _is(allowed, strict=True, **bounds)


@dataclass(frozen=True, config=_STRICT)
class DataConfig:
    """Which pictures."""

    folder: str | None = _is("a path, or null")
    held_out: float = _number("over 0, under 1", gt=0, lt=1)
    loaders: int | None = _number("0 to 256 processes, or null", ge=0, le=256)
    # Earlier runs have neither of these.
    cache: float = _number("0 to 100000 gigabytes", ge=0, le=100_000, default=0.0)
    damaged: str = _is("refuse, leave_out", pattern="^(refuse|leave_out)$", default="refuse")


@dataclass(frozen=True, config=_STRICT)
class ModelConfig:
    """Which architecture, from which weights, for pictures of which geometry."""

    name: str = _is("a classifier of torchvision, or timm:NAME")
    weights: str | None = _is("a path, or null")
    resize: int = _number("1 to 8192, whole pixels", ge=1, le=8192)
    crop: int = _number("1 to model.resize, whole pixels", ge=1)
    interpolation: str = _is(", ".join(INTERPOLATIONS), pattern=f"^({'|'.join(INTERPOLATIONS)})$")
    mean: tuple[_Number, _Number, _Number] = _is("three numbers, for red, green, blue")
    std: tuple[_Positive, _Positive, _Positive] = _is("three numbers over 0")
    # Earlier runs have neither.
    width: int | None = _number("1 to model.resize, whole pixels, or null", ge=1, default=None)
    fit: str = _is(", ".join(FITS), pattern=f"^({'|'.join(FITS)})$", default="crop")

    @field_validator("crop", "width")
    @classmethod
    def _fits(cls, side: int | None, info: ValidationInfo) -> int | None:
        if side is not None and side > (resize := info.data.get("resize", side)):
            raise ValueError(f"1 to model.resize ({resize}), whole pixels")
        return side

    @property
    def geometry(self) -> Geometry:
        """The geometry of validation and serving."""
        return Geometry(self.resize, self.crop, self.interpolation, fit=self.fit, width=self.width)


@dataclass(frozen=True, config=_STRICT)
class AugmentConfig:
    """How training pictures are varied."""

    scale: tuple[_Share, _Share] = _is("two shares, low first")
    ratio: tuple[_Positive, _Positive] = _is("two ratios over 0")
    flip: float = _number("0 to 1", ge=0, le=1)
    colour: float = _number("0 to 1", ge=0, le=1)

    @field_validator("scale")
    @classmethod
    def _rises(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if scale[0] > scale[1]:
            raise ValueError("two shares, low first")
        return scale


@dataclass(frozen=True, config=_STRICT)
class FitConfig:
    """The fixed schedule. `rate` is relative to the size of each tensor's weights."""

    recipe: str = _is(", ".join(RECIPES), pattern=f"^({'|'.join(RECIPES)})$")
    epochs: int = _number("0 to 10000, a whole number", ge=0, le=10_000)
    batch: int = _number("1 to 65536, a whole number", ge=1, le=65_536)
    rate: float = _number("over 0, at most 1", gt=0, le=1)
    warm_up: float = _number("0 to under 1", ge=0, lt=1)
    weight_decay: float = _number("0 to 1", ge=0, le=1)
    label_smoothing: float = _number("0 to under 1", ge=0, lt=1)
    batch_norm: str = _is("frozen or learnt", pattern="^(frozen|learnt)$")
    head_penalty: float | None = _number("over 0, or null", gt=0)
    average: float | None = _number("over 0, under 1, or null", gt=0, lt=1)
    # Earlier runs have neither.
    class_weights: str = _is("none or balanced", pattern="^(none|balanced)$", default="none")
    precision: str = _is("auto, fp32, bf16 or fp16", pattern="^(auto|fp32|bf16|fp16)$", default="auto")
    distil: str | None = _is("a run, or null", default=None)

    @field_validator("head_penalty")
    @classmethod
    def _learns(cls, penalty: float | None, info: ValidationInfo) -> float | None:
        if penalty is None and info.data.get("epochs") == 0:
            raise ValueError("over 0, where fit.epochs is 0")
        return penalty


@dataclass(frozen=True, config=_STRICT)
class OptimiserConfig:
    """What a step is. The defaults are those of runs from before it could be chosen."""

    name: str = _is("adamw or sgd", pattern="^(adamw|sgd)$", default="adamw")
    relative: bool = _is("true or false", strict=True, default=True)
    momentum: float = _number("0 to under 1", ge=0, lt=1, default=0.9)


@dataclass(frozen=True, config=_STRICT)
class ScheduleConfig:
    """What changes over the epochs; defaults as in `OptimiserConfig`."""

    shape: str = _is("cosine or constant", pattern="^(cosine|constant)$", default="cosine")
    frozen: int = _number("0 to 10000, a whole number", ge=0, le=10_000, default=0)
    patience: int | None = _number("at least 1, a whole number, or null", ge=1, default=None)
    watched: float = _number("over 0, under 1", gt=0, lt=1, default=0.1)


@dataclass(frozen=True, config=_STRICT)
class LogConfig:
    """Where the metrics go besides the run's own files."""

    tensorboard: bool = _is("true or false", strict=True, default=False)
    mlflow: str | None = _is("an address, or null", default=None)


@dataclass(frozen=True, config=_STRICT)
class ExportConfig:
    """Name, version and top-k of the exported model."""

    name: str | None = _is(f"null, or {NAMES}", pattern=f"^{NAME}$")
    version: str = _is(NAMES, pattern=f"^{NAME}$")
    top_k: int = _number("at least 1, a whole number", ge=1)


@dataclass(frozen=True, config=_STRICT)
class TrainConfig:
    """The whole configuration of `beeline train`; build it with `compose`."""

    data: DataConfig
    model: ModelConfig
    augment: AugmentConfig
    export: ExportConfig
    fit: FitConfig
    seed: int = _number("0 to 4294967295, a whole number", ge=0, lt=2**32)
    optimiser: OptimiserConfig = OptimiserConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    log: LogConfig = LogConfig()

    def save(self, path: Path) -> None:
        """Write the resolved configuration as YAML."""
        path.write_text(OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(self))), encoding="utf-8")


def _allowed(kind: type, prefix: str = "") -> dict[str, str]:
    """Return by dotted key what each value of a configuration class may be."""
    allowed: dict[str, str] = {}
    for name, field in kind.__pydantic_fields__.items():  # type: ignore[attr-defined]
        is_leaf = field.description is not None
        allowed |= {prefix + name: field.description} if is_leaf else _allowed(field.annotation, f"{name}.")
    return allowed


_ALLOWED = _allowed(TrainConfig)


def compose(
    overrides: Sequence[str] = (),
    recipe: str | None = None,
    environ: Mapping[str, str] = os.environ,
    folder: Path = FOLDER,
) -> TrainConfig:
    """Resolve the configuration: overrides, then environment, then the files in `folder`.

    Overrides are words in Hydra's grammar: `key=value`, as `model.name=resnet34`; `group=file`, as `augment=strong`;
    and `+experiment=file`. `recipe` is the `fit` file to take unless an override names one. Raise `ConfigError` for an
    unknown key, or an impossible value.
    """
    given = {override.key_or_group: override for override in map(_parse, overrides)}
    for key, override in given.items():
        _check_key(key, override)
    if recipe and "fit" not in given:
        overrides = [f"fit={recipe}", *overrides]
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            composed = hydra_compose("config", list(overrides))
        for key, variable in _VARIABLES.items():
            if environ.get(variable) and key not in given:
                OmegaConf.update(composed, key, environ[variable])
        return _validated(OmegaConf.to_container(composed, resolve=True), f" in the files of config/{FOLDER.name}")
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        words = f" (given: {' '.join(overrides)})" if overrides else ""
        at = getattr(error, "full_key", None)
        raise ConfigError(f"{f'{at}: ' if at else ''}{_first_line(error)}; correct the value{words}") from error


def quoted(value: object) -> str:
    """Return a value in Hydra's grammar, in which spaces and commas have a meaning."""
    text = "null" if value is None else str(value)
    if re.fullmatch(r"[\w.:/+-]+", text):
        return text
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def load(path: Path) -> TrainConfig:
    """Read a resolved configuration, as `save` wrote it; raise `ConfigError` when the file is damaged."""
    try:
        return _validated(OmegaConf.to_container(OmegaConf.load(path)))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException, ConfigError) as error:
        raise ConfigError(f"{path} is no training configuration ({_first_line(error)}); train again") from error


def _parse(word: str) -> Override:
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException as error:
        raise ConfigError(f"{word!r} is no override; write key=value, as model.name=resnet34") from error
    kind = OverrideType.ADD if override.key_or_group == _EXPERIMENT else OverrideType.CHANGE
    if override.type != kind or override.is_sweep_override():
        raise ConfigError(f"{word!r} adds, deletes or sweeps; only key=value and +experiment=NAME are understood")
    return override


def _check_key(key: str, override: Override) -> None:
    inside = next((known for known in sorted(_ALLOWED) if known.startswith(f"{key}.")), None)
    if files := sorted(path.stem for path in (FOLDER / key).glob("*.yaml")):
        if override.value() not in files:
            keys = f"; or set a key, as {inside}=..." if inside else ""
            raise ConfigError(f"{key} is {override.value()!r}{did_you_mean(str(override.value()), files)}{keys}")
    elif inside:
        raise ConfigError(f"{key} is a group of keys; set one of them, as {inside}=...")
    elif key not in _ALLOWED:
        raise ConfigError(f"unknown key {key}{did_you_mean(key, {*_ALLOWED, 'fit'})}")


def _validated(values: Any, where: str = "") -> TrainConfig:
    """Return the configuration, or raise one of pydantic's errors as a sentence; a misspelt key is the first."""
    try:
        return TypeAdapter(TrainConfig).validate_python(values)
    except ValidationError as error:
        errors = {".".join(map(str, each["loc"][:2])): each for each in error.errors()}
        key = min(errors, key=_ALLOWED.__contains__)
        if not key or (errors[key]["type"] in ("missing", "dataclass_type") and key not in _ALLOWED):
            raise ConfigError(f"{key or 'the configuration'} holds no keys{where}; restore its keys") from error
        if key not in _ALLOWED:
            raise ConfigError(f"unknown key {key}{where}{did_you_mean(key, _ALLOWED)}") from error
        kind, value = errors[key]["type"], OmegaConf.select(OmegaConf.create(values), key)
        # The third place of a `loc` is in a list that is too short.
        missing = kind == "missing" and len(errors[key]["loc"]) < 3
        allowed = errors[key]["ctx"]["error"] if kind == "value_error" else _ALLOWED[key]
        raise ConfigError(f"{key} is {'missing' if missing else repr(value)}; allowed: {allowed}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
