"""`config.properties`, read strictly: every key is known, typed and in range, or one sentence says why it is not.

TorchServe silently ignores a misspelt key. Here a mistake is an error that names file, line and nearest known key.
"""

from __future__ import annotations

import difflib
import json
import re
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import javaproperties
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from beeline.errors import ConfigError, did_you_mean
from host.files import write_whole
from serve.ports import Address


def _digits(value: object) -> object:
    """Refuse a text that is no whole number; pydantic itself would take 8.0 and 1_0."""
    if isinstance(value, str) and not re.fullmatch(r"[+-]?\d+", value, re.ASCII):
        raise PydanticCustomError("whole_number", "no whole number")
    return value


def _whole(default: int | None, low: int, high: int, unit: str) -> Any:
    """Return a field for a whole number; `unit` is for the error message."""
    return Field(default, ge=low, le=high, description=f"a whole number of {unit}, {low} to {high}")


def _switch() -> Any:
    return Field("false", pattern="^(true|false)$", description="true or false")


def _token() -> Any:
    return Field("", pattern="^[A-Za-z0-9_-]{16,200}$", description="16 to 200 letters, digits, '_' and '-'")


def _address(text: str, scheme: str = "http") -> Address:
    address = Address.parse(text)
    if address.scheme != scheme:
        raise ValueError(f"{scheme}://HOST:PORT, such as {scheme}://127.0.0.1:{8443 if scheme == 'https' else 8080}")
    return address


_HOSTS = r"^((\*\.)?[a-z0-9][a-z0-9.-]*(:[0-9]+)?[ ,]*)*$"
_Whole = Annotated[int, BeforeValidator(_digits)]
_Plain = Annotated[Address, BeforeValidator(_address)]
_Tls = Annotated[Address, BeforeValidator(lambda text: _address(text, "https"))]


class Entry(BaseModel):
    """The entry of `models` for one version of a model. It is strict: "8" and 8.0 are no whole numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, alias_generator=to_camel)

    min_workers: _Whole = _whole(None, 1, 256, "processes")
    max_workers: _Whole = _whole(None, 1, 256, "processes")
    batch_size: _Whole = _whole(None, 1, 1024, "requests")
    # From 1: both servers take 0 for "not given" and would wait their own default of 100 ms.
    max_batch_delay: _Whole = _whole(None, 1, 60_000, "milliseconds")
    response_timeout: _Whole = _whole(None, 1, 86_400, "seconds")
    startup_timeout: _Whole = _whole(None, 1, 86_400, "seconds")
    default_version: bool = Field(False, description="true or false")
    mar_name: str = Field("", pattern=r"^[^/]*\.mar$", description="the name of a .mar file in the store")

    @property
    def numbers(self) -> dict[str, int]:
        """The whole numbers that are given, by key."""
        return self.model_dump(by_alias=True, exclude_unset=True, exclude={"default_version", "mar_name"})

    @model_validator(mode="after")
    def _at_least_min(self) -> Entry:
        if {"min_workers", "max_workers"} <= self.model_fields_set and self.max_workers < self.min_workers:
            raise ValueError(f"maxWorkers of at least minWorkers ({self.min_workers})")
        return self


class File(BaseModel):
    """The file's keys with their defaults; a default of 0 means that `serve.config` computes one, or none."""

    job_queue_size: _Whole = _whole(200, 1, 100_000, "requests")
    number_of_netty_threads: _Whole = _whole(4, 1, 256, "threads")
    netty_client_threads: _Whole = _whole(2, 1, 256, "threads")
    max_response_size: _Whole = _whole(6_553_500, 1024, 2**31 - 1, "bytes")
    beeline_threads: _Whole = _whole(0, 1, 256, "threads")
    beeline_lone_threads: _Whole = _whole(0, 1, 256, "threads")
    # The server's limit in base64 must stay a Java int.
    beeline_max_image_bytes: _Whole = _whole(20_000_000, 1, 1_500_000_000, "bytes")
    beeline_max_image_pixels: _Whole = _whole(50_000_000, 1, 2**31 - 1, "pixels")
    beeline_log_megabytes: _Whole = _whole(10, 1, 10_000, "megabytes")
    beeline_log_files: _Whole = _whole(3, 1, 100, "files")
    beeline_heap_megabytes: _Whole = _whole(0, 128, 1_000_000, "megabytes")
    beeline_deadline_seconds: _Whole = _whole(60, 1, 3600, "seconds")
    beeline_requests_per_second: _Whole = _whole(0, 1, 1_000_000, "requests a second")
    beeline_drain_seconds: _Whole = _whole(0, 0, 600, "seconds")
    beeline_stop_seconds: _Whole = _whole(8, 1, 3600, "seconds")
    inference_address: _Plain = Address("127.0.0.1", 8080)
    management_address: _Plain = Address("127.0.0.1", 8081)
    beeline_page_address: _Plain = Address("127.0.0.1", 8000)
    beeline_metrics_address: _Plain = Address("127.0.0.1", 8082)
    # Used if there is a certificate.
    beeline_tls_address: _Tls = Address("127.0.0.1", 8443, "https")
    vmargs: str = ""
    install_py_dep_per_model: str = _switch()
    beeline_tls_certificate: str = ""
    beeline_tls_key: str = ""
    beeline_url_hosts: str = Field(
        "",
        pattern=_HOSTS,
        description="host names with commas between them, such as pictures.example.org, *.example.com",
    )
    beeline_url_http: str = _switch()
    beeline_url_seconds: _Whole = _whole(5, 1, 600, "seconds")
    beeline_kserve: str = _switch()
    beeline_server_routes: str = _switch()
    beeline_trusted_key: str = ""
    beeline_feedback: str = ""
    beeline_feedback_megabytes: _Whole = _whole(100, 1, 1_000_000, "megabytes")
    beeline_management_token: str = _token()
    beeline_feedback_token: str = _token()
    models: dict[str, dict[str, Entry]] = Field({}, description="a JSON object {model: {version: {batchSize: 8, ...}}}")


DEFAULTS = {key: each.default for key, each in File.model_fields.items()}
# Each key may also come from the environment, because in a container the file cannot be edited.
VARIABLES = {"BEELINE_" + key.removeprefix("beeline_").upper(): key for key in DEFAULTS if key != "models"}

# Keys of TorchServe that `serve up` writes, each with the source of its value.
_OWNED = {
    "max_request_size": "it is derived from beeline_max_image_bytes; set that",
    "load_models": "it is what `serve up --model` serves",
    "model_store": "it is the option `serve up --store`",
    "allowed_urls": "only the served archives are allowed",
    "enable_model_api": "models are not registered while the server runs",
    "disable_system_metrics": "`serve status` shows the processes",
    **dict.fromkeys(("grpc_inference_address", "grpc_management_address"), "gRPC stays on loopback"),
    **dict.fromkeys(("metrics_address", "grpc_inference_port", "grpc_management_port"), "a free port is taken"),
    "decode_input_request": "the handler parses requests itself",
    "default_workers_per_model": "it is minWorkers in models",
    "default_response_timeout": "it is responseTimeout in models, in seconds on both servers",
    "default_response_timeout_seconds": "it is responseTimeout in models",
    "preload_model": "each worker loads and tests its own model",
    "service_envelope": "the handler reads JSON itself",
}


@dataclass(frozen=True)
class Properties:
    """The values that the environment, else the file has; other keys are absent.

    `models` is `{name: {version: Entry}}`; `variables` is `{key: environment variable}` of the values from there.
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

    Raise ConfigError with file and line, key, value and what is allowed.
    """
    try:
        elements = list(javaproperties.parse(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing; restore it, or name another with --config") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); it must be a Java properties file in UTF-8") from error
    entries: dict[str, tuple[str, str]] = {}
    line = 1
    for element in elements:
        if isinstance(element, javaproperties.KeyValue):
            key, where = element.key, f"{path}:{line}"
            if key in _OWNED:
                raise ConfigError(f"{where}: {key} is set by `beeline serve up` ({_OWNED[key]}); remove this line")
            if key not in DEFAULTS:
                raise ConfigError(f"{where}: unknown key {key}{did_you_mean(key, DEFAULTS)}")
            if key in entries:
                raise ConfigError(f"{where}: {key} is set twice, first at {entries[key][1]}; keep one")
            entries[key] = (element.value.strip(), where)
        line += element.source.count("\n")
    variables: dict[str, str] = {}
    for name, value in (environ or {}).items():
        key = VARIABLES.get(name, "")
        if key and value.strip():
            entries[key], variables[key] = (value.strip(), f"environment {name}"), name
        # Other variables with this prefix mean something else, so only a near miss is a mistake.
        near = difflib.get_close_matches(name, VARIABLES, n=1, cutoff=0.93) if name.startswith("BEELINE_") else []
        if near and not key:
            raise ConfigError(f"environment: unknown variable {name}; did you mean {near[0]!r}?")
    values: dict[str, Any] = {key: value for key, (value, _) in entries.items()}
    if "models" in entries:
        values["models"] = _json(*entries["models"])
    try:
        file = File.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{entries[str(error.errors()[0]['loc'][0])][1]}: {sentence(error)}") from error
    numbers, addresses, texts = (
        {key: getattr(file, key) for key in entries if isinstance(getattr(file, key), kind)}
        for kind in (int, Address, str)
    )
    return Properties(path, numbers, addresses, texts, file.models, variables)


def sentence(error: ValidationError, name: str | None = None) -> str:
    """Return pydantic's first error as a sentence: the key, or `name` for it, its value, and what is allowed."""
    first = error.errors()[0]
    place = [str(each) for each in first["loc"]]
    key, entry = name or ".".join(place), {to_camel(key): field for key, field in Entry.model_fields.items()}
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}{did_you_mean(place[-1], entry)}"
    # The place is a key, or `models`, a model, a version and an entry's key.
    field = {**File.model_fields, **entry}[place[-1] if len(place) in (1, 4) else "models"]
    allowed = first["ctx"]["error"] if first["type"] == "value_error" else field.description
    return f"{key} is {first['input']!r}; allowed: {allowed}"


def _json(text: str, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise ConfigError(f"{where}: models has the key {key!r} twice; keep one")
        return values

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        place = text[max(0, error.pos - 20) : error.pos + 20]
        raise ConfigError(f"{where}: models is not JSON near {place!r} ({error.msg.lower()}); fix it there") from error
    except RecursionError as error:
        raise ConfigError(f"{where}: models is nested too deeply; allowed: {{model: {{version: {{...}}}}}}") from error


@dataclass(frozen=True)
class Change:
    """The file's text now and after the change."""

    path: Path
    before: str
    after: str

    @property
    def diff(self) -> str:
        """The unified diff; empty where nothing changes."""
        names = (f"{self.path.name} (now)", f"{self.path.name} (tuned)")
        return "\n".join(difflib.unified_diff(self.before.splitlines(), self.after.splitlines(), *names, lineterm=""))

    def write(self) -> None:
        """Replace the file in one step; raise ConfigError if it has changed meanwhile, or cannot be written."""
        path = self.path.resolve()
        try:
            if _text(path) != self.before:
                raise ConfigError(f"{self.path} changed while it was tuned; run it again with --write")
            write_whole(path, self.after, stat.S_IMODE(path.stat().st_mode))
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be written ({error.strerror}); change it as shown") from error


def change(path: Path, model: str, version: str, numbers: Mapping[str, int], threads: int | None) -> Change:
    """Return the file with new numbers for a model, and with a worker's threads if they are given.

    Comments and other keys stay; `models` stays on one line, or on lines that are indented by two spaces a level. A
    model's only entry is changed whatever its version is, because it serves any version. Raise ConfigError as `load`.
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
    """Return the text with the new value: in place of the old, else below the comment with the key, else at the end."""
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
