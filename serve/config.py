"""A server's numbers, each with its reason: from a flag, else the environment, else the file, else a default."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from archive.mar import Archive
from beeline.errors import ConfigError
from serve.properties import DEFAULTS, Entry, Properties, sentence

# The part of a request that is not the picture in base64: the rest of the JSON, or multipart's headers.
_ENVELOPE_BYTES = 65_536
_DEFAULT = "default"
_THREADS = "beeline_threads"
# The reason of the default rate.
RATE = "10 times job_queue_size"
# At most this many cores share a lone picture; more were not measured.
LONE = 4


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
        """Bytes of the largest request: the largest picture in base64, and the rest."""
        return self.numbers["beeline_max_image_bytes"].value * 4 // 3 + _ENVELOPE_BYTES

    @property
    def stop_grace(self) -> float:
        """Seconds that each process of a server gets to end before it is killed."""
        return self.numbers["beeline_drain_seconds"].value + self.numbers["beeline_stop_seconds"].value + 2.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """Return the settings with their reasons for people: a line for each model, then the file's other numbers."""
        out = []
        for model in self.models:
            settings = [(name, value) for name, value in vars(model).items() if isinstance(value, Setting)]
            because: dict[str, list[str]] = {}
            for name, setting in settings:
                because.setdefault(setting.reason, []).append(f"{name} {setting.value}")
            shown = "; ".join(f"{', '.join(numbers)} ({reason})" for reason, numbers in because.items())
            out.append(f"{model.model} {model.version}: {shown}")
        lone = self.numbers["beeline_lone_threads"]
        out.append(
            f"threads a worker {self.threads.value} ({self.threads.reason}); OpenVINO's for a lone picture "
            f"{lone.value} ({lone.reason})"
        )
        rest = {name: value for name, value in self.numbers.items() if name != "beeline_lone_threads"}
        chosen = [f"{name} {value.value}" for name, value in rest.items() if value.reason != _DEFAULT]
        return out + ([", ".join(chosen)] if chosen else [])


def resolve(
    properties: Properties,
    archives: Sequence[Archive],
    overrides: Overrides,
    environ: Mapping[str, str],
    cores: int,
    gpus: int,
) -> Configuration:
    """Decide every number for these archives.

    Args:
        properties: the checked file.
        archives: what is served.
        overrides: the command line's options.
        environ: `BATCH_SIZE`, `WORKERS` and `LINGER_MS` in it win over the file.
        cores: processor cores that may be used.
        gpus: GPUs that may be used.

    Raises:
        ConfigError: for an option or a variable out of range.
    """
    forced = {
        "batchSize": _forced(overrides.batch_size, "--batch-size", environ, "BATCH_SIZE", "batchSize"),
        "workers": _forced(overrides.workers, "--workers", environ, "WORKERS", "minWorkers"),
        "maxBatchDelay": _forced(overrides.max_batch_delay, "--max-batch-delay", environ, "LINGER_MS", "maxBatchDelay"),
    }
    models = tuple(_model(archive, archives, properties, forced, cores, gpus) for archive in archives)
    workers = sum(model.min_workers.value for model in models)
    threads = _threads(properties, cores, workers)
    numbers = {
        key: Setting(properties.numbers[key], properties.source(key))
        if key in properties.numbers
        else Setting(value, _DEFAULT)
        for key, value in DEFAULTS.items()
        if isinstance(value, int) and key != _THREADS
    }
    queue = numbers["job_queue_size"].value
    if not numbers["beeline_requests_per_second"].value:
        numbers["beeline_requests_per_second"] = Setting(10 * queue, RATE)
    if not numbers["beeline_lone_threads"].value:
        numbers["beeline_lone_threads"] = _lone_threads(models, threads.value, cores)
    return Configuration(models, threads, numbers, properties.texts.get("vmargs", ""))


def model_settings(values: Mapping[str, Any]) -> ModelSettings:
    """Return one model's settings from the values of `to_dict`."""
    settings: dict[str, Any] = {
        key: Setting(**value) if isinstance(value, dict) else value for key, value in values.items()
    }
    return ModelSettings(**settings)


def _forced(flag: int | None, option: str, environ: Mapping[str, str], variable: str, key: str) -> Setting | None:
    """Return the number that wins over the file, or None."""
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

    wanted, why = _default_workers(cores, gpus)
    low = decide("minWorkers", min(wanted, entry.numbers.get("maxWorkers", wanted)), why, forced["workers"])
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
    """Return the file's entry for this archive, and its place; a model's only entry is for any version."""
    versions = properties.models.get(archive.model, {})
    file = properties.path.name
    if archive.version in versions:
        return versions[archive.version], file
    if len(versions) == 1:
        version, entry = next(iter(versions.items()))
        return entry, f"{file}, its entry for {archive.model} {version}"
    return Entry.model_validate({}), f"{file} has no entry for {archive.model} {archive.version}"


def _threads(properties: Properties, cores: int, workers: int) -> Setting:
    """Return the threads of a worker: those of the file or the environment, else each worker's share of the cores."""
    if _THREADS in properties.numbers:
        return Setting(properties.numbers[_THREADS], properties.source(_THREADS))
    return Setting(max(1, cores // max(1, workers)), f"{cores} cores / {workers} workers")


def _lone_threads(models: Sequence[ModelSettings], threads: int, cores: int) -> Setting:
    """Return the threads of a lone picture: all cores up to `LONE`, unless batches are of one picture."""
    if any(model.batch_size.value == 1 for model in models):
        return Setting(threads, "as many as a worker's, since batches are of one")
    if threads >= min(cores, LONE):
        return Setting(threads, "as many as a worker's")
    return Setting(min(cores, LONE), f"{cores} cores, at most {LONE}")


def _default_workers(cores: int, gpus: int) -> tuple[int, str]:
    if gpus:
        return gpus, f"one a GPU, {gpus} found"
    # Each worker holds its own copy of the model and of PyTorch, over half a gigabyte.
    return min(4, max(1, cores // 2)), f"half of {cores} cores, at most 4"
