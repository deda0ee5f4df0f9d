"""What a search tries: overrides of `beeline train` in Hydra's grammar, of which some have choices or intervals."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, QuotedString
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf
from optuna.trial import Trial

from archive.variants import Variant, known, left_out
from beeline.errors import ConfigError
from train.config import FOLDER, compose, quoted

DEFAULTS = FOLDER.parent / "search.yaml"
ACCURACY = "accuracy"
# Keys of a space that say how a network is served, and the values of fit.distil: the default's run, and none, since
# Hydra's choices have no null.
SERVING, TEACHER, NOBODY = ("engine", "precision"), "teacher", "none"


@dataclass(frozen=True)
class Space:
    """Overrides of `beeline train`: `fixed` words of every trial, and what is searched, by key.

    `weights` are files of starting weights by architecture; that of "" is for any other. `recipe` is the planned one.
    """

    fixed: tuple[str, ...]
    sweeps: Mapping[str, Any]
    weights: Mapping[str, str]
    recipe: str | None = None

    def words(self, params: Mapping[str, Any]) -> list[str]:
        """Return the overrides of a trial. The resize follows the crop where nothing sets it."""
        given = [(key, value) for key, value in params.items() if key not in SERVING]
        given = [(key, None if (key, value) == ("fit.distil", NOBODY) else value) for key, value in given]
        words = [*self.fixed, *(f"{key}={quoted(value)}" for key, value in given)]
        keys = {word.partition("=")[0] for word in words}
        model = compose([*words, *([] if "model.resize" in keys else ["model.resize=8192"])], environ={}).model
        if "model.crop" in keys and "model.resize" not in keys:
            words.append(f"model.resize={round(model.crop * 8 / 7)}")
        file = self.weights.get(model.name, self.weights.get(""))
        return [*words, *([f"model.weights={quoted(file)}"] if file else [])]

    def default(self) -> dict[str, Any]:
        """Return the parameters of the first trial: the configuration's own values, else the first choices."""
        own, params = OmegaConf.create(asdict(compose(self.fixed, self.recipe, environ={}))), dict[str, Any]()
        for key, sweep in self.sweeps.items():
            value = OmegaConf.select(own, key)
            if isinstance(sweep, ChoiceSweep):
                params[key] = value if value in _choices(sweep) else _choices(sweep)[0]
            else:
                value = value if isinstance(value, int | float) else sweep.start
                params[key] = type(value)(min(max(value, sweep.start), sweep.end))
        return params

    def architectures(self) -> set[str]:
        """Return the names of the networks that are tried; raise `ConfigError` for an unknown key."""
        first, keys = self.default(), {"model", "model.name"} & self.sweeps.keys()
        rows = [first, *({**first, key: value} for key in keys for value in _choices(self.sweeps[key]))]
        return {compose(self.words(row), environ={}).model.name for row in rows}

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """Return the parameters of a trial; whole numbers where the configuration's own value is one."""
        own, params = self.default(), dict[str, Any]()
        for key, sweep in self.sweeps.items():
            if isinstance(sweep, ChoiceSweep):
                params[key] = trial.suggest_categorical(key, _choices(sweep))
            else:
                suggest: Any = trial.suggest_int if isinstance(own[key], int) else trial.suggest_float
                params[key] = suggest(
                    key, type(own[key])(sweep.start), type(own[key])(sweep.end), log="log" in sweep.tags
                )
        return params

    def all(self) -> list[dict[str, Any]] | None:
        """Return every combination where all keys have choices, the default first; None for a space of numbers."""
        if not all(isinstance(sweep, ChoiceSweep) for sweep in self.sweeps.values()):
            return None
        rows = itertools.product(*map(_choices, self.sweeps.values()))
        return sorted((dict(zip(self.sweeps, row, strict=True)) for row in rows), key=lambda row: row != self.default())


def read_space(words: Sequence[str], objective: str, weights: Sequence[str] = ()) -> Space:
    """Return the space of `key=choice(...)` and other words; where none searches, that of `config/search.yaml`.

    `weights` are files, or NAME=FILE for one architecture. Raise `ConfigError` for a word that is no override, an
    unknown key, or an engine and a precision that cannot be served here.
    """
    fixed, sweeps, parser = dict[str, str](), dict[str, Any](), OverridesParser.create()
    defaults: Any = OmegaConf.load(DEFAULTS)
    try:
        overrides = parser.parse_overrides(list(words))
        if not any(each.is_sweep_override() for each in overrides):
            overrides += parser.parse_overrides(list(defaults[objective]))
    except OverrideParseException as error:
        raise ConfigError(f"{error.override!r} is no override; write key=choice(one,other), or key=value") from error
    for override in overrides:
        key: str = override.key_or_group
        value: Any = override.value()
        if isinstance(value, ChoiceSweep | IntervalSweep) or key in SERVING:
            sweep = value if override.is_sweep_override() else ChoiceSweep(list=[value])
            sweeps |= {} if key in fixed else {key: sweeps.get(key, sweep)}
        else:
            fixed[key] = str(override.input_line)
    if sweeps.keys() & set(SERVING):
        if objective == ACCURACY:
            raise ConfigError("engine and precision need --objective accuracy,milliseconds; add it, or leave them out")
        for key, first in zip(SERVING, ("openvino", "fp32"), strict=True):
            sweeps.setdefault(key, ChoiceSweep(list=[first]))
        for pair in itertools.starmap(Variant, itertools.product(*(_choices(sweeps[key]) for key in SERVING))):
            if why := left_out(pair) if pair in known() else f"choose among {', '.join(map(str, known()))}":
                raise ConfigError(f"no trial can be served by {pair}: {why}")
    # A file's path may contain an equals sign.
    parts = [("", "", each) if Path(each).is_file() else each.rpartition("=") for each in weights]
    space = Space(tuple(fixed.values()), sweeps, {name: str(Path(file).absolute()) for name, _, file in parts})
    if unknown := space.weights.keys() - {"", *space.architectures()}:
        names = " and ".join(sorted(space.architectures()))
        raise ConfigError(f"--weights names {' and '.join(unknown)}, but the networks of this search are {names}")
    return space


def _choices(sweep: ChoiceSweep) -> list[Any]:
    return [each.text if isinstance(each, QuotedString) else each for each in sweep.list]
