"""What one gateway runs with: addresses, backends, limits, folders; JSON in its runtime folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve.values import Address

FILE = "settings.json"


@dataclass(frozen=True)
class Backend:
    """One server behind the gateway: where it predicts, where it is asked how its workers are, where those count."""

    inference: str
    management: str
    counts: str | None = None


@dataclass(frozen=True)
class Name:
    """Backends on other hosts, each with a gateway of its own: a name that resolves to all, and their ports."""

    host: str
    port: int
    management_port: int


@dataclass(frozen=True)
class Tls:
    """Where TLS is spoken, and with which certificate (PEM, the whole chain) and key (PEM)."""

    address: Address
    certificate: Path
    key: Path


@dataclass(frozen=True)
class Settings:
    """One gateway.

    Attributes:
        folder: its runtime folder, made by `serve.gateway.runtime`.
        program: nginx; None for the development proxy.
        version: nginx's version, or the proxy's library and version.
        listen: public addresses, each with page and API.
        management: where nginx stands before the management API of a lone backend; None where nothing does.
        metrics: the internal address of `/metrics`; None where no workers of this machine are counted.
        backends: the servers; with several the ready ones share the load. None where they are found by `name`.
        store: a folder with the archives that they serve, for golden pictures; None where they are found by `name`.
        versions: whether they serve several versions of one model.
        max_body: bytes of the largest request.
        max_image: bytes of the largest picture, for the error's sentence.
        in_flight: requests that one backend holds at most.
        per_second: requests a second of one client address.
        deadline: seconds for one prediction.
        drain: seconds, once it is told to stop, for which it still takes requests while `/ping` says 503 already.
        stop: seconds after that for what is under way.
        processes: nginx's worker processes.
        logs: the folder of access.log and gateway.log.
        log_megabytes: size at which one is rotated.
        log_files: how many old ones are kept.
        worker_metrics: where the workers count that `/metrics` tells of; None where those of `backends` tell it.
        tls: None without a certificate.
        name: how backends on other hosts are found; None where `backends` lists them.
        management_from: the addresses that may ask for management; none named means all that reach it.
        defaults: by model, the version that answers where a prediction names none.
    """

    folder: Path
    program: str | None
    version: str
    listen: tuple[Address, ...]
    backends: tuple[Backend, ...]
    store: Path | None
    versions: bool
    max_body: int
    max_image: int
    in_flight: int
    per_second: int
    deadline: int
    drain: int
    stop: int
    processes: int
    logs: Path
    log_megabytes: int
    log_files: int
    metrics: Address | None = None
    worker_metrics: Path | None = None
    management: Address | None = None
    tls: Tls | None = None
    name: Name | None = None
    management_from: tuple[str, ...] = ()
    defaults: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """`nginx` or `development`."""
        return "development" if self.program is None else "nginx"

    @property
    def web(self) -> Path:
        """The document root."""
        return self.folder / "web"

    @property
    def ready_file(self) -> Path:
        """There only while the gateway is ready; its text is the answer of `/ping` then."""
        return self.folder / "state" / "ready"

    @property
    def open_file(self) -> Path:
        """There only while the gateway lets predictions through: a while longer than it is ready, when it stops."""
        return self.folder / "state" / "open"

    @property
    def closed_folder(self) -> Path:
        """Has a file `MODEL@VERSION` for each prediction that is not let through while others are."""
        return self.folder / "state" / "closed"

    @property
    def unready_file(self) -> Path:
        """The answer of `/ping` otherwise."""
        return self.folder / "state" / "unready"

    def save(self) -> None:
        """Write the settings into the runtime folder."""
        text = json.dumps(dataclasses.asdict(self), default=str, indent=1)
        (self.folder / FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Settings:
        """Read what `save` wrote."""
        values: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
        for key in ("folder", "store", "logs", "worker_metrics"):
            values[key] = None if values[key] is None else Path(values[key])
        values["listen"] = tuple(Address(**one) for one in values["listen"])
        values["backends"] = tuple(Backend(**one) for one in values["backends"])
        for key in ("management", "metrics"):
            values[key] = values[key] and Address(**values[key])
        values["name"] = values["name"] and Name(**values["name"])
        values["management_from"] = tuple(values["management_from"])
        tls = values["tls"]
        values["tls"] = tls and Tls(Address(**tls["address"]), Path(tls["certificate"]), Path(tls["key"]))
        return cls(**values)
