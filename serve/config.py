"""A server's numbers, each with its reason: from an option, else the environment, else the file, else a default."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from archive.mar import Archive
from beeline.errors import ConfigError
from serve.properties import DEFAULTS, Entry, Properties, sentence

_DEFAULT = "default"
# The reason of the default rate.
RATE = "10 times job_queue_size"
# A lone picture gets at most this many cores; more were not measured.
_LONE = 4


@dataclass(frozen=True)
class Setting:
    """One number and the reason for it."""

    value: int
    reason: str


@dataclass(frozen=True)
class ModelSettings:
    """The settings of one archive, in requests, milliseconds, processes and seconds."""

    model: str
    version: str
    archive: str
    default_version: bool
    batch_size: Setting
    max_batch_delay: Setting
    min_workers: Setting
    max_workers: Setting
    response_timeout: Setting
    startup_timeout: Setting


@dataclass(frozen=True)
class Overrides:
    """The command line's options; None where one was not given."""

    batch_size: int | None = None
    workers: int | None = None
    max_batch_delay: int | None = None


@dataclass(frozen=True)
class Configuration:
    """The resolved configuration of one server; stored with its instance."""

    models: tuple[ModelSettings, ...]
    threads: Setting
    numbers: Mapping[str, Setting] = field(default_factory=dict)
    vmargs: str = ""

    @property
    def max_request_size(self) -> int:
        """Bytes of the largest request: the largest picture in base64, and 64 KiB for JSON or multipart around it."""
        return self.numbers["beeline_max_image_bytes"].value * 4 // 3 + 65_536

    @property
    def stop_grace(self) -> float:
        """Seconds that each process of a server gets to end before it is killed."""
        return self.numbers["beeline_drain_seconds"].value + self.numbers["beeline_stop_seconds"].value + 2.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """Return for people the settings with their reasons: a line a model, threads, then the file's other numbers."""
        out = []
        for model in self.models:
            because: dict[str, list[str]] = {}
            for name, setting in vars(model).items():
                if isinstance(setting, Setting):
                    because.setdefault(setting.reason, []).append(f"{name} {setting.value}")
            shown = "; ".join(f"{', '.join(numbers)} ({reason})" for reason, numbers in because.items())
            out.append(f"{model.model} {model.version}: {shown}")
        lone = self.numbers["beeline_lone_threads"]
        out.append(
            f"threads a worker {self.threads.value} ({self.threads.reason}); OpenVINO's for a lone picture "
            f"{lone.value} ({lone.reason})"
        )
        chosen = [
            f"{name} {number.value}"
            for name, number in self.numbers.items()
            if number.reason != _DEFAULT and name != "beeline_lone_threads"
        ]
        return out + ([", ".join(chosen)] if chosen else [])


def resolve(
    properties: Properties,
    archives: Sequence[Archive],
    overrides: Overrides,
    environ: Mapping[str, str],
    cores: int,
    gpus: int,
) -> Configuration:
    """Decide every number for these archives, on a machine with `cores` and `gpus` to use.

    `BATCH_SIZE`, `WORKERS` and `LINGER_MS` in `environ` win over the file, and `overrides` over both. Raise ConfigError
    for one that is out of range.
    """
    forced = {
        "batchSize": _forced(overrides.batch_size, "--batch-size", environ, "BATCH_SIZE", "batchSize"),
        "workers": _forced(overrides.workers, "--workers", environ, "WORKERS", "minWorkers"),
        "maxBatchDelay": _forced(overrides.max_batch_delay, "--max-batch-delay", environ, "LINGER_MS", "maxBatchDelay"),
    }
    models = tuple(_model(archive, archives, properties, forced, cores, gpus) for archive in archives)
    workers = sum(model.min_workers.value for model in models)
    numbers = {key: Setting(value, _DEFAULT) for key, value in DEFAULTS.items() if isinstance(value, int)}
    numbers |= {key: Setting(value, properties.source(key)) for key, value in properties.numbers.items()}
    threads = numbers.pop("beeline_threads")
    if not threads.value:
        threads = Setting(max(1, cores // max(1, workers)), f"{cores} cores / {workers} workers")
    queue = numbers["job_queue_size"].value
    if not numbers["beeline_requests_per_second"].value:
        numbers["beeline_requests_per_second"] = Setting(10 * queue, RATE)
    if not numbers["beeline_lone_threads"].value:
        numbers["beeline_lone_threads"] = _lone_threads(models, threads.value, cores)
    return Configuration(models, threads, numbers, properties.texts.get("vmargs", ""))


def model_settings(values: Mapping[str, Any]) -> ModelSettings:
    """Return one model's settings from the values of `to_dict`."""
    return ModelSettings(**{key: Setting(**each) if isinstance(each, dict) else each for key, each in values.items()})


def _forced(flag: int | None, option: str, environ: Mapping[str, str], variable: str, key: str) -> Setting | None:
    """Return the number of the option, else of the variable; None if neither is given."""
    text = environ.get(variable, "").strip()
    if flag is None and not text:
        return None
    name, reason, value = (option, option, flag) if flag is not None else (variable, f"environment {variable}", text)
    try:
        return Setting(Entry.model_validate({key: value}, strict=False).numbers[key], reason)
    except ValidationError as error:
        raise ConfigError(sentence(error, name)) from error


def _model(
    archive: Archive,
    archives: Sequence[Archive],
    properties: Properties,
    forced: Mapping[str, Setting | None],
    cores: int,
    gpus: int,
) -> ModelSettings:
    entry, source = _entry(archive, properties)
    absent = f"default: {source}" if not entry.numbers else _DEFAULT

    def decide(key: str, default: int, why: str, force: Setting | None = None) -> Setting:
        if force is not None:
            return force
        return Setting(entry.numbers[key], source) if key in entry.numbers else Setting(default, why)

    # Each worker holds its own copy of the model and of PyTorch, over half a gigabyte.
    usual, why = min(4, max(1, cores // 2)), f"half of {cores} cores, at most 4"
    if gpus:
        usual, why = gpus, f"one a GPU, {gpus} found"
    low = decide("minWorkers", min(usual, entry.numbers.get("maxWorkers", usual)), why, forced["workers"])
    high = decide("maxWorkers", low.value, "as many as at the start", forced["workers"])
    if high.value < low.value:
        high = Setting(low.value, f"at least min_workers; {high.reason}")
    only = sum(other.model == archive.model for other in archives) == 1
    return ModelSettings(
        model=archive.model,
        version=archive.version,
        archive=archive.path.name,
        default_version=only or entry.default_version,
        batch_size=decide("batchSize", 8, absent, forced["batchSize"]),
        max_batch_delay=decide("maxBatchDelay", 2, absent, forced["maxBatchDelay"]),
        min_workers=low,
        max_workers=high,
        response_timeout=decide("responseTimeout", 120, absent),
        startup_timeout=decide("startupTimeout", 120, absent),
    )


def _entry(archive: Archive, properties: Properties) -> tuple[Entry, str]:
    """Return the file's entry for this archive, and the reason; a model's only entry serves any version."""
    versions = properties.models.get(archive.model, {})
    file = properties.path.name
    if archive.version in versions:
        return versions[archive.version], file
    if len(versions) == 1:
        version, entry = next(iter(versions.items()))
        return entry, f"{file}, its entry for {archive.model} {version}"
    return Entry.model_validate({}), f"{file} has no entry for {archive.model} {archive.version}"


def _lone_threads(models: Sequence[ModelSettings], threads: int, cores: int) -> Setting:
    """Return the threads of a lone picture: all cores up to `_LONE`, unless every batch is one picture."""
    if any(model.batch_size.value == 1 for model in models):
        return Setting(threads, "as many as a worker's, since batches are of one")
    if threads >= min(cores, _LONE):
        return Setting(threads, "as many as a worker's")
    return Setting(min(cores, _LONE), f"{cores} cores, at most {_LONE}")
