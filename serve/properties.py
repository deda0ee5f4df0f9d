"""`config.properties`, read strictly: every key is known, typed and in range, or one sentence says why it is not.

TorchServe silently ignores a misspelt key. Here a mistake is an error that names file, line and nearest known key.
"""

from __future__ import annotations

import difflib
import json
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import javaproperties

from beeline.errors import ConfigError, did_you_mean
from host.files import write_whole
from serve.ports import Address


@dataclass(frozen=True)
class Whole:
    """A whole number from `low` to `high`; `unit` is for the error's sentence."""

    low: int
    high: int
    unit: str

    def check(self, value: object) -> int:
        """Return the number.

        Raises:
            ValueError: with what is allowed.
        """
        if isinstance(value, bool) or not isinstance(value, int) or not self.low <= value <= self.high:
            raise ValueError(f"a whole number of {self.unit}, {self.low} to {self.high}")
        return value

    def parse(self, text: str) -> int:
        """Return the number in `text`; raise as `check` does."""
        try:
            value: object = int(text)
        except ValueError:
            value = text
        return self.check(value)


BATCH_SIZE = Whole(1, 1024, "requests")
WORKERS = Whole(1, 256, "processes")
# Not 0: both servers take it for "not given", and would wait for their default of 100 ms.
DELAY = Whole(1, 60_000, "milliseconds")
TIMEOUT = Whole(1, 86_400, "seconds")

NUMBERS = {
    "job_queue_size": Whole(1, 100_000, "requests"),
    "number_of_netty_threads": Whole(1, 256, "threads"),
    "netty_client_threads": Whole(1, 256, "threads"),
    "max_response_size": Whole(1024, 2**31 - 1, "bytes"),
    "beeline_threads": Whole(1, 256, "threads"),
    "beeline_lone_threads": Whole(1, 256, "threads"),
    # The server's limit in base64 must stay a Java int.
    "beeline_max_image_bytes": Whole(1, 1_500_000_000, "bytes"),
    "beeline_max_image_pixels": Whole(1, 2**31 - 1, "pixels"),
    "beeline_log_megabytes": Whole(1, 10_000, "megabytes"),
    "beeline_log_files": Whole(1, 100, "files"),
    "beeline_deadline_seconds": Whole(1, 3600, "seconds"),
    "beeline_requests_per_second": Whole(1, 1_000_000, "requests a second"),
    "beeline_drain_seconds": Whole(0, 600, "seconds"),
    "beeline_stop_seconds": Whole(1, 3600, "seconds"),
}
ADDRESSES = (
    "inference_address",
    "management_address",
    "beeline_page_address",
    "beeline_metrics_address",
    "beeline_tls_address",
)
TEXTS = ("vmargs", "beeline_tls_certificate", "beeline_tls_key")
KNOWN = (*NUMBERS, *ADDRESSES, *TEXTS, "models")
# Each of these keys may come from the environment too, since a container has no file to edit.
VARIABLES = {"BEELINE_" + key.removeprefix("beeline_").upper(): key for key in (*NUMBERS, *ADDRESSES, *TEXTS)}

# Keys of TorchServe that `serve up` writes, each with the source of its value.
OWNED = {
    "max_request_size": "it is derived from beeline_max_image_bytes; set that",
    "load_models": "it is what `serve up --model` serves",
    "model_store": "it is the option `serve up --store`",
    "allowed_urls": "only the served archives are allowed",
    "enable_model_api": "models are not registered while the server runs",
    "install_py_dep_per_model": "archives bring no dependencies of their own",
    "disable_system_metrics": "`serve status` shows the processes",
    "metrics_address": "a free loopback port is taken",
    "grpc_inference_address": "gRPC stays on loopback",
    "grpc_management_address": "gRPC stays on loopback",
    "grpc_inference_port": "a free loopback port is taken",
    "grpc_management_port": "a free loopback port is taken",
    "decode_input_request": "the handler parses requests itself",
    "default_workers_per_model": "it is minWorkers in models",
    "default_response_timeout": "it is responseTimeout in models, in seconds on both servers",
    "default_response_timeout_seconds": "it is responseTimeout in models",
    "preload_model": "each worker loads and tests its own model",
    "service_envelope": "the handler reads JSON itself",
}

ENTRY_NUMBERS = {
    "minWorkers": WORKERS,
    "maxWorkers": WORKERS,
    "batchSize": BATCH_SIZE,
    "maxBatchDelay": DELAY,
    "responseTimeout": TIMEOUT,
    "startupTimeout": TIMEOUT,
}
ENTRY_KEYS = (*ENTRY_NUMBERS, "defaultVersion", "marName")


@dataclass(frozen=True)
class Entry:
    """The entry of `models` for one version of a model: whole numbers by key, and the two other keys."""

    numbers: Mapping[str, int]
    default_version: bool | None = None
    mar_name: str | None = None


@dataclass(frozen=True)
class Properties:
    """The values of the file, or of the environment, which wins; keys that neither has are absent.

    `models` is `{name: {version: Entry}}`; `variables` names the environment variable of each value that came from one.
    """

    path: Path
    numbers: Mapping[str, int] = field(default_factory=dict)
    addresses: Mapping[str, Address] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, Mapping[str, Entry]] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)

    def source(self, key: str) -> str:
        """Return the source of a value, for people."""
        return f"environment {self.variables[key]}" if key in self.variables else self.path.name


def load(path: Path, environ: Mapping[str, str] | None = None) -> Properties:
    """Read and check the file, and the variables of `VARIABLES` in `environ`, which win over it.

    Raises:
        ConfigError: naming file, line, key, value and what is allowed.
    """
    try:
        elements = list(javaproperties.parse(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing; restore it, or name another with --config") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); it must be a Java properties file in UTF-8") from error
    found: dict[str, tuple[str, str]] = {}
    line = 1
    for element in elements:
        if isinstance(element, javaproperties.KeyValue):
            where = f"{path}:{line}"
            _check_key(element.key, where)
            if element.key in found:
                raise ConfigError(f"{where}: {element.key} is set twice, first at {found[element.key][1]}; keep one")
            found[element.key] = (element.value.strip(), where)
        line += element.source.count("\n")
    variables: dict[str, str] = {}
    _check_variables(environ or {})
    for name, key in VARIABLES.items():
        value = (environ or {}).get(name, "").strip()
        if value:
            found[key], variables[key] = (value, f"environment {name}"), name
    numbers, addresses = {}, {}
    for key, (value, where) in found.items():
        try:
            if key in NUMBERS:
                numbers[key] = NUMBERS[key].parse(value)
            elif key in ADDRESSES:
                addresses[key] = _address(key, value)
        except ValueError as error:
            raise ConfigError(f"{where}: {key} is {value!r}; allowed: {error}") from error
    models = _models(*found["models"]) if "models" in found else {}
    texts = {key: found[key][0] for key in TEXTS if key in found}
    return Properties(path, numbers, addresses, texts, models, variables)


def _address(key: str, value: str) -> Address:
    address = Address.parse(value)
    wanted = "https" if key == "beeline_tls_address" else "http"
    if address.scheme != wanted:
        raise ValueError(f"{wanted}://HOST:PORT, such as {wanted}://127.0.0.1:{8443 if wanted == 'https' else 8080}")
    return address


def _check_key(key: str, where: str) -> None:
    if key in OWNED:
        raise ConfigError(f"{where}: {key} is set by `beeline serve up` ({OWNED[key]}); remove this line")
    if key not in KNOWN:
        raise ConfigError(f"{where}: unknown key {key}{did_you_mean(key, KNOWN)}")


def _check_variables(environ: Mapping[str, str]) -> None:
    """Refuse a misspelt variable; other variables with this prefix belong to other programs."""
    for name in environ:
        if name.startswith("BEELINE_") and name not in VARIABLES:
            meant = difflib.get_close_matches(name, VARIABLES, n=1, cutoff=0.93)
            if meant:
                raise ConfigError(f"environment: unknown variable {name}; did you mean {meant[0]!r}?")


def _models(text: str, where: str) -> dict[str, dict[str, Entry]]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for index, (key, _) in enumerate(pairs):
            if key in dict(pairs[:index]):
                raise ConfigError(f"{where}: models has the key {key!r} twice; keep one")
        return dict(pairs)

    try:
        values = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        place = text[max(0, error.pos - 20) : error.pos + 20]
        raise ConfigError(f"{where}: models is not JSON near {place!r} ({error.msg.lower()}); fix it there") from error
    except RecursionError as error:
        raise ConfigError(f"{where}: models is nested too deeply; allowed: {{model: {{version: {{...}}}}}}") from error
    models: dict[str, dict[str, Entry]] = {}
    for name, versions in _object(values, where, "models", "{model: {version: {...}}}").items():
        models[name] = {}
        for version, entry in _object(versions, where, f"models.{name}", "{version: {...}}").items():
            key = f"models.{name}.{version}"
            models[name][version] = _entry(_object(entry, where, key, '{"batchSize": 8, ...}'), where, key)
    return models


def _object(value: object, where: str, key: str, form: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: {key} is {value!r}; allowed: a JSON object {form}")
    return value


def _entry(values: dict[str, Any], where: str, key: str) -> Entry:
    for name, value in values.items():
        if name not in ENTRY_KEYS:
            raise ConfigError(f"{where}: unknown key {key}.{name}{did_you_mean(name, ENTRY_KEYS)}")
        try:
            if name in ENTRY_NUMBERS:
                ENTRY_NUMBERS[name].check(value)
            elif name == "defaultVersion" and not isinstance(value, bool):
                raise ValueError("true or false")
            elif name == "marName" and not (isinstance(value, str) and value.endswith(".mar") and "/" not in value):
                raise ValueError("the name of a .mar file in the store")
        except ValueError as error:
            raise ConfigError(f"{where}: {key}.{name} is {value!r}; allowed: {error}") from error
    numbers = {name: value for name, value in values.items() if name in ENTRY_NUMBERS}
    low, high = numbers.get("minWorkers"), numbers.get("maxWorkers")
    if low is not None and high is not None and low > high:
        raise ConfigError(f"{where}: {key}.maxWorkers is {high}, less than minWorkers ({low}); raise it")
    return Entry(numbers, values.get("defaultVersion"), values.get("marName"))


@dataclass(frozen=True)
class Change:
    """The file's text as it is and as it would be."""

    path: Path
    before: str
    after: str

    @property
    def diff(self) -> str:
        """The unified diff; empty where nothing changes."""
        names = (f"{self.path.name} (now)", f"{self.path.name} (tuned)")
        return "\n".join(difflib.unified_diff(self.before.splitlines(), self.after.splitlines(), *names, lineterm=""))

    def write(self) -> None:
        """Replace the file's text in one step.

        Raises:
            ConfigError: when the file has changed meanwhile, or cannot be written.
        """
        path = self.path.resolve()
        try:
            if _text(path) != self.before:
                raise ConfigError(f"{self.path} changed while it was tuned; run it again with --resume and --write")
            write_whole(path, self.after, stat.S_IMODE(path.stat().st_mode))
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be written ({error.strerror}); change it as shown") from error


def change(path: Path, model: str, version: str, numbers: Mapping[str, int], threads: int | None) -> Change:
    """Return the file with a model's numbers, and with a worker's threads where they are given.

    Comments and other keys stay as they are; `models` stays on one line, or on lines with two spaces a level. A model's
    only entry is changed whatever its version is, since it is the one that is read.

    Raises:
        ConfigError: for a file that cannot be read.
    """
    versions = load(path).models.get(model, {})
    version = next(iter(versions)) if len(versions) == 1 else version
    before = after = _text(path)
    end = "\r\n" if "\r\n" in before else "\n"
    elements = [each for each in javaproperties.parse(before) if isinstance(each, javaproperties.KeyValue)]
    entry = next((each for each in elements if each.key == "models"), None)
    models = json.loads(entry.value if entry else "{}")
    kept = dict(models.get(model, {}).get(version, {}))
    if (entry_numbers := {**kept, **numbers}) != kept:
        models.setdefault(model, {})[version] = entry_numbers
        is_one_line = entry is not None and "\n" not in entry.source.rstrip()
        value = json.dumps(models, indent=None if is_one_line else 2, ensure_ascii=False).replace("\\", "\\\\")
        after = _put(after, "models", value.replace("\n", f"\\{end}"), end)
    if threads is not None:
        after = _put(after, "beeline_threads", str(threads), end)
    return Change(path, before, after)


def _put(text: str, key: str, value: str, end: str) -> str:
    """Return the text with a new value: in place of the old, else below the comment that shows the key, else last."""
    at = 0
    for element in javaproperties.parse(text):
        source = element.source
        if isinstance(element, javaproperties.KeyValue) and element.key == key:
            head = re.match(r"[ \t\f]*(?:[^\\=: \t\f]|\\.)+[ \t\f]*[=:]?[ \t\f]*", source, re.DOTALL)
            assert head is not None
            return text[: at + head.end()] + value + text[at + len(source.rstrip("\r\n")) :]
        at += len(source)
    if example := re.search(rf"^[#!][ \t]*{key}[ \t]*[=:][^\r\n]*", text, re.MULTILINE):
        return f"{text[: example.end()]}{end}{key}={value}{text[example.end() :]}"
    return f"{text}{'' if text.endswith(end) or not text else end}{key}={value}{end}"


def _text(path: Path) -> str:
    with path.open(encoding="utf-8", newline="") as file:
        return file.read()
