"""The settings of one gateway: addresses, backends, limits, folders; stored as JSON in its runtime folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beeline.errors import ConfigError
from host import machine
from host.files import check_writable, write_whole
from serve.ports import Address

if TYPE_CHECKING:  # the gateway reads its own settings: its process holds no pydantic
    from serve.addresses import Addresses
    from serve.config import Configuration
    from serve.gateway.nginx import Choice
    from serve.properties import Properties

FILE = "settings.json"
# The part of the server's heap that bodies of each class may fill, by the most bytes of one; `LARGEST` is any larger
# one, and any of unknown length. nginx's map of `$group` has the same classes. Java holds a body once, and for a moment
# twice; with three quarters in bodies it still answers (bench/LOG.md).
LARGEST = 0
CLASSES = {260_000: 0.2, 1_000_000: 0.1, 4_000_000: 0.15, 10_000_000: 0.15, LARGEST: 0.15}


@dataclass(frozen=True)
class Backend:
    """One server behind the gateway: its URLs, the folder where its workers count, the file of what did not start."""

    inference: str
    management: str
    counts: str | None = None
    failed: str | None = None


@dataclass(frozen=True)
class Name:
    """Backends on other hosts, each with a gateway of its own: a name that resolves to all of them, and their ports."""

    host: str
    port: int
    management_port: int


@dataclass(frozen=True)
class Tls:
    """The listener for TLS, with its certificate (PEM, the whole chain) and key (PEM)."""

    address: Address
    certificate: Path
    key: Path


@dataclass(frozen=True)
class Settings:
    """One gateway."""

    folder: Path  # the runtime folder, which `serve.gateway.runtime` makes
    program: str  # nginx
    version: str  # of nginx
    listen: tuple[Address, ...]  # public addresses, each with page and API
    max_body: int  # bytes of the largest request
    max_image: int  # bytes of the largest picture, for the error's sentence
    in_flight: int  # requests of one class of size that one backend holds at most
    per_second: int  # requests a second of one client address
    deadline: int  # seconds for one prediction
    drain: int  # seconds after SIGTERM in which it still takes requests while `/ping` says 503
    stop: int  # seconds after that for requests under way
    processes: int  # worker processes of nginx
    logs: Path  # the folder of access.log and gateway.log
    log_megabytes: int  # a larger log is rotated
    log_files: int  # how many rotated logs are kept
    # By the most bytes of a body, how many requests of that class one backend holds; 0 is any larger one.
    places: Mapping[int, int] = field(default_factory=dict)
    backends: tuple[Backend, ...] = ()  # the ready ones share the load; empty where `name` finds them
    store: Path | None = None  # the served archives, for their golden pictures; None where `name` finds the backends
    versions: bool = False  # whether the backends serve several versions of one model
    metrics: Address | None = None  # internal address of `/metrics`
    worker_metrics: Path | None = None  # the folder where the workers count that `/metrics` reports
    management: Address | None = None  # internal address of the management API of a lone backend
    tls: Tls | None = None
    name: Name | None = None  # finds the backends on other hosts; None where `backends` lists them
    management_from: tuple[str, ...] = ()  # addresses that may use management; empty means all that can reach it
    invocations: str = ""  # the model whose prediction `POST /invocations` is
    defaults: Mapping[str, str] = field(default_factory=dict)  # by model, the version that a URL without one means
    url_hosts: tuple[str, ...] = ()  # hosts of pictures by URL, `*.` for any below, with `:PORT` where it is unusual
    url_http: bool = False  # whether their URLs may be http too
    url_seconds: int = 5  # for one of their pictures
    kserve: bool = False  # whether the KServe protocols answer
    server_routes: bool = False  # whether the servers' own other routes answer
    feedback: str = ""  # the folder of pictures that people say were answered wrongly; empty means that none is kept
    feedback_megabytes: int = 100  # that this folder may hold
    feedback_token: str = ""  # who has it may send such pictures; empty means browsers on this machine
    management_token: str = ""  # who has it may scale; empty means all that reach management

    @property
    def adapter(self) -> bool:
        """Whether something is on that `serve.gateway.adapter` answers."""
        return bool(self.url_hosts or self.kserve or self.feedback)

    @property
    def access_log(self) -> Path:
        """The log with a line of JSON for each request."""
        return self.logs / "access.log"

    @property
    def error_log(self) -> Path:
        """The log of nginx's own errors."""
        return self.logs / "gateway.log"

    @property
    def web(self) -> Path:
        """The document root."""
        return self.folder / "web"

    @property
    def state(self) -> Path:
        """The folder from which nginx learns the state of the backends.

        `ready` or `unready` is the answer of `/ping`. `open` exists while predictions pass; a gateway that stops is
        open for a while after `ready` has gone. `closed` has a file `MODEL@VERSION` for each kind of prediction that is
        refused while others pass.
        """
        return self.folder / "state"

    def save(self) -> None:
        """Write the settings into the runtime folder."""
        text = json.dumps(dataclasses.asdict(self), default=str, indent=1)
        # It may hold a token.
        write_whole(self.folder / FILE, text, 0o600)

    @classmethod
    def load(cls, folder: Path) -> Settings:
        """Read what `save` wrote."""
        values: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
        for key in ("folder", "store", "logs", "worker_metrics"):
            values[key] = values[key] and Path(values[key])
        values["places"] = {int(size): count for size, count in values["places"].items()}
        values["listen"] = tuple(Address(**one) for one in values["listen"])
        values["backends"] = tuple(Backend(**one) for one in values["backends"])
        for key in ("management", "metrics"):
            values[key] = values[key] and Address(**values[key])
        values["name"] = values["name"] and Name(**values["name"])
        for key in ("management_from", "url_hosts"):
            values[key] = tuple(values[key])
        tls = values["tls"]
        values["tls"] = tls and Tls(Address(**tls["address"]), Path(tls["certificate"]), Path(tls["key"]))
        return cls(**values)


def public(
    choice: Choice, configuration: Configuration, properties: Properties, at: Addresses, **others: Any
) -> Settings:
    """Return settings: limits from the configuration, listeners from `at`, the other attributes from `others`."""
    files = tls_files(choice, properties)
    numbers = {key: setting.value for key, setting in configuration.numbers.items()}
    values: dict[str, Any] = {
        "listen": at.public,
        "management": at.management,
        "metrics": at.metrics,
        "program": choice.program,
        "version": choice.version,
        "max_body": configuration.max_request_size,
        "max_image": numbers["beeline_max_image_bytes"],
        "in_flight": numbers["job_queue_size"],
        "places": configuration.places,
        "per_second": numbers["beeline_requests_per_second"],
        "deadline": numbers["beeline_deadline_seconds"],
        "drain": numbers["beeline_drain_seconds"],
        "stop": numbers["beeline_stop_seconds"],
        # nginx passes several thousand requests a second on one core, and the workers need the others.
        "processes": max(1, machine.cores() // 8),
        "log_megabytes": numbers["beeline_log_megabytes"],
        "log_files": numbers["beeline_log_files"],
        "tls": Tls(at.tls, *files) if files is not None and at.tls is not None else None,
        **adapted(choice, properties),
        "url_seconds": numbers["beeline_url_seconds"],
        "feedback_megabytes": numbers["beeline_feedback_megabytes"],
        "management_token": properties.texts.get("beeline_management_token", ""),
        "defaults": {model.model: model.version for model in configuration.models if model.default_version},
    }
    return Settings(**{**values, **others})


def adapted(choice: Choice, properties: Properties) -> dict[str, Any]:
    """Return what is on beyond the plain API; raise ConfigError where it is, without nginx."""
    texts = properties.texts
    switches = {name: texts.get(f"beeline_{name}") == "true" for name in ("url_http", "kserve", "server_routes")}
    folder = texts.get("beeline_feedback", "") and str(Path(texts["beeline_feedback"]).resolve())
    hosts = tuple(texts.get("beeline_url_hosts", "").replace(",", " ").split())
    on = {"url_hosts": hosts, **switches, "feedback": folder}
    if choice.kind != "nginx" and (names := [f"beeline_{name}" for name, value in on.items() if value]):
        raise ConfigError(
            f"{properties.path}: {names[0]} needs nginx, and --gateway is {choice.kind}; leave --gateway out"
        )
    if folder:
        check_writable(Path(folder))
    return {**on, "feedback_token": texts.get("beeline_feedback_token", "")}


def tls_files(choice: Choice, properties: Properties) -> tuple[Path, Path] | None:
    """Return certificate and key; None where TLS is not asked for.

    Raises:
        ConfigError: for one without the other, an address without them, a missing file, or a start without nginx.
    """
    names = ("beeline_tls_certificate", "beeline_tls_key")
    given = [name for name in (*names, "beeline_tls_address") if name in {*properties.texts, *properties.addresses}]
    if not given:
        return None
    for name in names:
        if name not in given:
            raise ConfigError(
                f"{properties.path}: {given[0]} is set, {name} is not; TLS needs a certificate and its key: add {name}"
            )
        if not Path(properties.texts[name]).is_file():
            raise ConfigError(f"{properties.path}: {name} is {properties.texts[name]!r}, which is missing; mount it")
    if choice.kind != "nginx":
        raise ConfigError(f"{properties.path}: TLS needs nginx, and --gateway is {choice.kind}; leave --gateway out")
    certificate, key = (Path(properties.texts[name]).resolve() for name in names)
    return certificate, key
