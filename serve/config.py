"""A server's numbers, each with its reason: from an option, else the environment, else the file, else a default."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.alias_generators import to_camel

from archive.mar import Archive
from archive.store import names
from beeline.errors import ConfigError
from serve.gateway.settings import CLASSES, LARGEST
from serve.properties import DEFAULTS, Entry, Properties, sentence

_DEFAULT, _TEXTS = "default", ("vmargs", "install_py_dep_per_model", "beeline_trusted_key")
# The reason of the default rate.
RATE = "10 times job_queue_size"
_MEGABYTE = 1 << 20
# A lone picture gets at most this many cores; more were not measured.
LONE = 4
# Bytes of the server, nginx and the gateway; of a worker whose engine is OpenVINO, without its weights; and of one that
# holds PyTorch. bench/LOG.md has the measurements.
_SERVER, _LEAN, _PYTORCH = 400_000_000, 150_000_000, 700_000_000


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
    install_py_dep_per_model: str = "false"
    beeline_trusted_key: str = ""
    warning: str = ""

    @property
    def max_request_size(self) -> int:
        """Bytes of the largest request: the largest picture in base64, and 64 KiB for JSON or multipart around it."""
        return self.numbers["beeline_max_image_bytes"].value * 4 // 3 + 65_536

    @property
    def places(self) -> dict[int, int]:
        """How many bodies of each of `CLASSES` the server holds at most."""
        heap = self.numbers["beeline_heap_megabytes"].value * _MEGABYTE
        of_class = {size: int(part * heap / (size or self.max_request_size)) for size, part in CLASSES.items()}
        return {size: max(1, count) for size, count in of_class.items()}

    @property
    def stop_grace(self) -> float:
        """Seconds that each process of a server gets to end before it is killed."""
        return self.numbers["beeline_drain_seconds"].value + self.numbers["beeline_stop_seconds"].value + 2.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """Return the settings with their reasons for people: models, threads, and numbers that are given."""
        out = []
        for model in self.models:
            settings = {name: value for name, value in vars(model).items() if isinstance(value, Setting)}
            out.append(f"{model.model} {model.version}: {_text(settings)}")
        lone = self.numbers["beeline_lone_threads"]
        out.append(
            f"threads a worker {self.threads.value} ({self.threads.reason}); OpenVINO's for a lone picture "
            f"{lone.value} ({lone.reason})"
        )
        held, queue = self.places, self.numbers["job_queue_size"].value
        counts = [f"{min(queue, count)} up to {size / 1e6:g} MB" for size, count in held.items() if size != LARGEST]
        if self.models:
            out.append(f"requests that the server holds, by size: {', '.join(counts)}, {held[LARGEST]} larger ones")
        given = {
            name: number
            for name, number in self.numbers.items()
            if number.reason != _DEFAULT and name != "beeline_lone_threads"
        }
        return out + ([_text(given)] if given else []) + ([self.warning] if self.warning else [])


def _text(settings: Mapping[str, Setting]) -> str:
    """Return settings for people, those with the same reason together."""
    because: dict[str, list[str]] = {}
    for name, setting in settings.items():
        because.setdefault(setting.reason, []).append(f"{name} {setting.value}")
    return "; ".join(f"{', '.join(numbers)} ({reason})" for reason, numbers in because.items())


def resolve(
    properties: Properties,
    archives: Sequence[Archive],
    overrides: Overrides,
    environ: Mapping[str, str],
    cores: int,
    gpus: int,
    memory: int,
) -> Configuration:
    """Decide every number for these archives, on a machine with `cores`, `gpus` and bytes of `memory` to use.

    `BATCH_SIZE`, `WORKERS` and `LINGER_MS` in `environ` win over the file, and `overrides` over both. Raise ConfigError
    for one that is out of range.
    """
    forced: dict[str, Setting] = {}
    for keys, option, value, variable in (
        (["batchSize"], "--batch-size", overrides.batch_size, "BATCH_SIZE"),
        (["minWorkers", "maxWorkers"], "--workers", overrides.workers, "WORKERS"),
        (["maxBatchDelay"], "--max-batch-delay", overrides.max_batch_delay, "LINGER_MS"),
    ):
        text = environ.get(variable, "").strip()
        if value is not None:
            forced |= dict.fromkeys(keys, Setting(_checked(option, keys[0], value), option))
        elif text:
            forced |= dict.fromkeys(keys, Setting(_checked(variable, keys[0], text), f"environment {variable}"))
    numbers = {key: Setting(value, _DEFAULT) for key, value in DEFAULTS.items() if isinstance(value, int)}
    numbers |= {key: Setting(value, properties.source(key)) for key, value in properties.numbers.items()}
    if archives:
        numbers["beeline_heap_megabytes"] = _heap(numbers, properties.texts.get("vmargs", ""), environ, memory)
    server = max(_SERVER, numbers["beeline_heap_megabytes"].value * _MEGABYTE)
    usual, chosen = _workers(archives, cores, gpus, memory, server), defaults(archives, properties)
    models = tuple(_model(archive, archive in chosen, properties, forced, usual) for archive in archives)
    workers = sum(model.min_workers.value for model in models)
    threads = numbers.pop("beeline_threads")
    if not threads.value:
        threads = Setting(max(1, cores // max(1, workers)), f"{cores} cores / {workers} workers")
    queue = numbers["job_queue_size"].value
    if not numbers["beeline_requests_per_second"].value:
        numbers["beeline_requests_per_second"] = Setting(10 * queue, RATE)
    if not numbers["beeline_lone_threads"].value:
        numbers["beeline_lone_threads"] = _lone_threads(models, threads.value, cores)
    texts = {key: properties.texts[key] for key in _TEXTS if key in properties.texts}
    needed = server + sum(
        model.min_workers.value * worker_bytes(archive) for model, archive in zip(models, archives, strict=True)
    )
    if archives and needed > memory:
        texts["warning"] = (
            f"warning: {workers} workers and the server take about {_megabytes(needed)}, and {_megabytes(memory)} of "
            "memory are free: start fewer (--workers, WORKERS, minWorkers), serve fewer models, or allow more memory"
        )
    return Configuration(models, threads, numbers, **texts)


def java_options(vmargs: str, environ: Mapping[str, str]) -> str:
    """Return all options that Java reads, from the command line and the environment; the last of a kind wins."""
    before = (environ.get(name, "") for name in ("JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS"))
    return " ".join((*before, vmargs, environ.get("_JAVA_OPTIONS", "")))


def _heap(numbers: Mapping[str, Setting], vmargs: str, environ: Mapping[str, str], memory: int) -> Setting:
    """Return the heap in megabytes; one in Java's options wins. Raise ConfigError for one that is too small."""
    largest = numbers["beeline_max_image_bytes"].value * 4 // 3 + 65_536
    queue = numbers["job_queue_size"].value * 260_000 / CLASSES[260_000]
    sizes = {
        "an eighth of the free memory, at most 1024": min(1 << 30, memory // 8),
        "two of the largest bodies": 2 * largest / CLASSES[LARGEST],
        "a full queue of small bodies, at most a quarter of the free memory": min(queue, memory // 4),
    }
    reason = max(sizes, key=lambda name: sizes[name])
    heap = numbers["beeline_heap_megabytes"]
    if given := re.findall(r"-Xmx(\d+)([kKmMgG]?)", java_options(vmargs, environ)):
        amount, unit = given[-1]
        heap = Setting(int(amount) * 1024 ** "_kmg".find(unit.lower() or "_") // _MEGABYTE, "-Xmx in Java's options")
    elif not heap.value:
        heap = Setting(-(-int(sizes[reason]) // _MEGABYTE), reason)
    if heap.value < (least := 2 * largest // _MEGABYTE + 1):
        fix = f"two of the largest bodies take {least}; give it more, or lower beeline_max_image_bytes"
        raise ConfigError(f"the server's heap is {heap.value} MB ({heap.reason}), and {fix}")
    return heap


def worker_bytes(archive: Archive) -> int:
    """Return about how many bytes of memory a worker takes: its engine's libraries, and its files twice."""
    return (_LEAN if archive.engine in ("openvino", "onnxruntime") else _PYTORCH) + 2 * archive.unpacked


def _workers(archives: Sequence[Archive], cores: int, gpus: int, memory: int, server: int) -> Setting:
    """Return how many workers a model has by default, where the server itself takes `server` bytes."""
    if gpus:
        return Setting(gpus, f"one a GPU, {gpus} found")
    usual, each = min(4, max(1, cores // 2)), sum(map(worker_bytes, archives))
    hold = max(1, (memory - server) // max(1, each))
    if hold < usual:
        return Setting(hold, f"one of each model takes about {_megabytes(each)}, and {_megabytes(memory)} are free")
    return Setting(usual, f"half of {cores} cores, at most 4")


def _megabytes(size: int) -> str:
    return f"{size // 10**6:,} MB"


def defaults(archives: Sequence[Archive], properties: Properties) -> tuple[Archive, ...]:
    """Return each model's default: the version that the file calls so, else the store's index, else the first."""

    def rank(archive: Archive) -> tuple[bool, bool]:
        entry = properties.models.get(archive.model, {}).get(archive.version)
        return entry is not None and entry.default_version, archive.default

    return tuple(max((one for one in archives if one.model == name), key=rank) for name in names(archives))


def model_settings(values: Mapping[str, Any]) -> ModelSettings:
    """Return one model's settings from the values of `to_dict`."""
    return TypeAdapter(ModelSettings).validate_python(values)


def _checked(name: str, key: str, value: int | str) -> int:
    """Return the value of an option or a variable for a key of an entry."""
    try:
        return Entry.model_validate({key: value}, strict=False).numbers[key]
    except ValidationError as error:
        raise ConfigError(sentence(error, name)) from error


def _model(
    archive: Archive, is_default: bool, properties: Properties, forced: Mapping[str, Setting], default: Setting
) -> ModelSettings:
    entry, source = _entry(archive, properties)
    deadline = {**DEFAULTS, **properties.numbers}["beeline_deadline_seconds"]
    absent = f"default: {source}" if not entry.numbers else _DEFAULT
    numbers = {
        "batchSize": Setting(8, absent),
        "maxBatchDelay": Setting(2, absent),
        "minWorkers": Setting(min(default.value, entry.numbers.get("maxWorkers", default.value)), default.reason),
        "responseTimeout": Setting(max(1, deadline // 2), "half of beeline_deadline_seconds"),
        "startupTimeout": Setting(120, absent),
        **{key: Setting(value, source) for key, value in entry.numbers.items()},
        **forced,
    }
    # An answer after the deadline reaches nobody.
    if numbers["responseTimeout"].value > deadline:
        numbers["responseTimeout"] = Setting(deadline, f"beeline_deadline_seconds, since {source} has a longer one")
    low = numbers["minWorkers"]
    high = numbers.setdefault("maxWorkers", Setting(low.value, "as many as at the start"))
    if high.value < low.value:
        numbers["maxWorkers"] = Setting(low.value, f"at least min_workers; {high.reason}")
    settings = {name: numbers[key] for name in Entry.model_fields if (key := to_camel(name)) in numbers}
    return ModelSettings(archive.model, archive.version, archive.path.name, is_default, **settings)


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
    """Return the threads of a lone picture: all cores up to `LONE`, unless every batch is one picture."""
    if any(model.batch_size.value == 1 for model in models):
        return Setting(threads, "as many as a worker's, since batches are of one")
    if threads >= min(cores, LONE):
        return Setting(threads, "as many as a worker's")
    return Setting(min(cores, LONE), f"{cores} cores, at most {LONE}")
