"""What a server runs with: every number with the reason for it, flag over environment over file over default."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from beeline.errors import ConfigError
from serve.properties import BATCH_SIZE, DELAY, WORKERS, Address, Entry, Properties, Whole
from serve.store import Archive

# Around a picture in base64: the rest of the JSON, or multipart's headers.
_ENVELOPE_BYTES = 65_536
_DEFAULT = "default"
_DEFAULTS = {
    "number_of_netty_threads": 4,
    "netty_client_threads": 2,
    "job_queue_size": 200,
    "max_response_size": 6_553_500,
    "beeline_max_image_bytes": 20_000_000,
    "beeline_max_image_pixels": 50_000_000,
    "beeline_log_megabytes": 10,
    "beeline_log_files": 3,
}
_ADDRESSES = {
    "inference_address": Address("127.0.0.1", 8080),
    "management_address": Address("127.0.0.1", 8081),
}


@dataclass(frozen=True)
class Setting:
    """One number and why it is that."""

    value: int
    reason: str


@dataclass(frozen=True)
class ModelSettings:
    """How one archive is served: requests, milliseconds, processes, seconds."""

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
    port: int | None = None
    management_port: int | None = None


@dataclass(frozen=True)
class Configuration:
    """The resolved configuration of one server; stored with its instance."""

    models: tuple[ModelSettings, ...]
    threads: Setting
    numbers: Mapping[str, Setting] = field(default_factory=dict)
    inference: Address = _ADDRESSES["inference_address"]
    management: Address = _ADDRESSES["management_address"]
    vmargs: str = ""

    @property
    def max_request_size(self) -> int:
        """Bytes of the largest request: the largest picture in base64, and what is around it."""
        return self.numbers["beeline_max_image_bytes"].value * 4 // 3 + _ENVELOPE_BYTES

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = dataclasses.asdict(self)
        values["inference"], values["management"] = str(self.inference), str(self.management)
        return values

    def lines(self) -> list[str]:
        """Return the settings with their reasons for people: a line a model, then what the file says beyond it."""
        out = []
        for model in self.models:
            settings = [(name, value) for name, value in vars(model).items() if isinstance(value, Setting)]
            because: dict[str, list[str]] = {}
            for name, setting in settings:
                because.setdefault(setting.reason, []).append(f"{name} {setting.value}")
            shown = "; ".join(f"{', '.join(numbers)} ({reason})" for reason, numbers in because.items())
            out.append(f"{model.model} {model.version}: {shown}")
        out.append(f"threads a worker {self.threads.value} ({self.threads.reason})")
        chosen = [f"{name} {value.value}" for name, value in self.numbers.items() if value.reason != _DEFAULT]
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
        ConfigError: for an option or a variable out of range, or a management address that others reach.
    """
    forced = {
        "batchSize": _forced(overrides.batch_size, "--batch-size", environ, "BATCH_SIZE", BATCH_SIZE),
        "workers": _forced(overrides.workers, "--workers", environ, "WORKERS", WORKERS),
        "maxBatchDelay": _forced(overrides.max_batch_delay, "--max-batch-delay", environ, "LINGER_MS", DELAY),
    }
    models = tuple(_model(archive, archives, properties, forced, cores, gpus) for archive in archives)
    workers = sum(model.min_workers.value for model in models)
    threads = Setting(max(1, cores // workers), f"{cores} cores / {workers} workers")
    file = properties.path.name
    numbers = {
        key: Setting(properties.numbers[key], file) if key in properties.numbers else Setting(value, _DEFAULT)
        for key, value in _DEFAULTS.items()
    }
    inference, management = addresses(properties, overrides)
    return Configuration(models, threads, numbers, inference, management, properties.vmargs)


def addresses(properties: Properties, overrides: Overrides) -> tuple[Address, Address]:
    """Return where predictions and management listen; a port of 0 asks for a free one.

    Raises:
        ConfigError: for a port out of range, a management address that others reach, or one for both.
    """
    found = {**_ADDRESSES, **properties.addresses}
    inference = _with_port(found["inference_address"], overrides.port, "--port")
    # Whoever asks for any free port wants no fixed one for management either.
    management_port = 0 if overrides.port == 0 and overrides.management_port is None else overrides.management_port
    management = _with_port(found["management_address"], management_port, "--management-port")
    for key, address in (("inference_address", inference), ("management_address", management)):
        if not address.loopback:
            raise ConfigError(
                f"{properties.path}: {key} is {address}, which other machines may reach, and neither server gets "
                f"security fixes; use {_ADDRESSES[key]}"
            )
    if inference == management and inference.port != 0:
        raise ConfigError(f"predictions and management are both on {inference}; give --management-port another one")
    return inference, management


def model_settings(values: Mapping[str, Any]) -> ModelSettings:
    """Return one model's settings from what `to_dict` made of them."""
    settings: dict[str, Any] = {
        key: Setting(**value) if isinstance(value, dict) else value for key, value in values.items()
    }
    return ModelSettings(**settings)


def _forced(flag: int | None, option: str, environ: Mapping[str, str], variable: str, kind: Whole) -> Setting | None:
    """Return the number that wins over the file, or None."""
    text = environ.get(variable, "").strip()
    try:
        if flag is not None:
            return Setting(kind.check(flag), option)
        if text:
            return Setting(kind.parse(text), f"environment {variable}")
    except ValueError as error:
        name, value = (option, flag) if flag is not None else (variable, text)
        raise ConfigError(f"{name} is {value!r}; allowed: {error}") from error
    return None


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
        default_version=only or bool(entry.default_version),
        batch_size=decide("batchSize", 8, absent, forced["batchSize"]),
        max_batch_delay=decide("maxBatchDelay", 2, absent, forced["maxBatchDelay"]),
        min_workers=low,
        max_workers=high,
        response_timeout=decide("responseTimeout", 120, absent),
        startup_timeout=decide("startupTimeout", 120, absent),
    )


def _entry(archive: Archive, properties: Properties) -> tuple[Entry, str]:
    """Return the file's entry for this archive and where it stands; a lone entry of the model fits any version."""
    versions = properties.models.get(archive.model, {})
    file = properties.path.name
    if archive.version in versions:
        return versions[archive.version], file
    if len(versions) == 1:
        version, entry = next(iter(versions.items()))
        return entry, f"{file}, its entry for {archive.model} {version}"
    return Entry({}), f"{file} has no entry for {archive.model} {archive.version}"


def _default_workers(cores: int, gpus: int) -> tuple[int, str]:
    if gpus:
        return gpus, f"one a GPU, {gpus} found"
    # Each worker holds its own copy of the model and of PyTorch, over half a gigabyte.
    return min(4, max(1, cores // 2)), f"half of {cores} cores, at most 4"


def _with_port(address: Address, port: int | None, option: str) -> Address:
    if port is None:
        return address
    try:
        return Address(address.host, Whole(0, 65_535, "a port, 0 for a free one").check(port))
    except ValueError as error:
        raise ConfigError(f"{option} is {port!r}; allowed: {error}") from error


def with_addresses(configuration: Configuration, inference: Address, management: Address) -> Configuration:
    """Return the configuration with the addresses that were really taken."""
    return dataclasses.replace(configuration, inference=inference, management=management)
