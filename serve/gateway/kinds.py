"""Which gateway stands before the servers, with the reason, and its settings for a server on this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from beeline.errors import ConfigError, Undetermined, did_you_mean
from host import machine
from serve.addresses import Addresses
from serve.config import Configuration
from serve.gateway import nginx
from serve.gateway.settings import Backend, Settings, Tls
from serve.properties import Properties
from serve.servers.protocol import Places
from serve.values import Address

NAMES = ("auto", "nginx", "development", "none")
# nginx passes several thousand requests a second on one core; the others are the workers'.
_CORES_A_PROCESS = 8


@dataclass(frozen=True)
class Choice:
    """A gateway: `kind` is nginx, development or none; `sentence` says why to people."""

    kind: str
    program: str | None
    version: str
    sentence: str


def choose(wanted: str, environ: Mapping[str, str] = os.environ) -> Choice:
    """Return the gateway to use.

    Args:
        wanted: one of `NAMES`.
        environ: its PATH is searched.

    Raises:
        ConfigError: for another name.
        Undetermined: when nginx is asked for and not there, or is too old.
    """
    if wanted not in NAMES:
        raise ConfigError(f"--gateway is {wanted!r}{did_you_mean(wanted, NAMES)}")
    if wanted == "none":
        return Choice("none", None, "", "none, as asked: the server itself answers, on loopback only")
    found = nginx.find_nginx(environ) if wanted in ("auto", "nginx") else None
    if found is not None:
        return Choice("nginx", found[0], found[1], f"nginx {found[1]} ({found[0]})")
    if wanted == "nginx":
        raise Undetermined("--gateway is nginx, and none is on the PATH; install it (Debian: apt-get install nginx)")
    library = f"aiohttp {version('aiohttp')}"
    why = "as asked" if wanted == "development" else "there is no nginx on the PATH"
    sentence = f"a development proxy ({library}) on loopback, {why}; install nginx before others are to reach it"
    return Choice("development", None, library, sentence)


def local(
    choice: Choice,
    addresses: Addresses,
    configuration: Configuration,
    places: Places,
    properties: Properties,
    versions: bool,
) -> Settings:
    """Return the settings of a gateway before the one server that is started with it.

    Raises:
        ConfigError: as `tls_files` does.
    """
    return public(
        choice,
        configuration,
        properties,
        folder=places.gateway,
        listen=addresses.public,
        tls=addresses.tls,
        backends=(Backend(str(addresses.backend), str(addresses.control), str(places.metrics)),),
        store=places.store,
        versions=versions,
        logs=places.logs,
        metrics=addresses.metrics,
        management=addresses.management,
        worker_metrics=places.metrics,
    )


def public(
    choice: Choice, configuration: Configuration, properties: Properties, *, tls: Address | None, **places: Any
) -> Settings:
    """Return the settings of any gateway: its limits from the configuration, everything else as given.

    Args:
        choice: which gateway.
        configuration: what the servers run with.
        properties: the checked file, for TLS.
        tls: where TLS is spoken, if there is a certificate.
        places: the other attributes of `Settings`.

    Raises:
        ConfigError: as `tls_files` does.
    """
    files = tls_files(choice, properties)
    numbers = {key: setting.value for key, setting in configuration.numbers.items()}
    return Settings(
        program=choice.program,
        version=choice.version,
        max_body=configuration.max_request_size,
        max_image=numbers["beeline_max_image_bytes"],
        in_flight=numbers["job_queue_size"],
        per_second=numbers["beeline_requests_per_second"],
        deadline=numbers["beeline_deadline_seconds"],
        drain=numbers["beeline_drain_seconds"],
        stop=numbers["beeline_stop_seconds"],
        processes=max(1, machine.cores() // _CORES_A_PROCESS),
        log_megabytes=numbers["beeline_log_megabytes"],
        log_files=numbers["beeline_log_files"],
        tls=Tls(tls, *files) if files is not None and tls is not None else None,
        defaults={model.model: model.version for model in configuration.models if model.default_version},
        **places,
    )


def tls_files(choice: Choice, properties: Properties) -> tuple[Path, Path] | None:
    """Return certificate and key; None where TLS is not asked for.

    Raises:
        ConfigError: for one without the other, an address without them, a file that is not there, or another
            gateway than nginx.
    """
    names = ("beeline_tls_certificate", "beeline_tls_key")
    given = [name for name in (*names, "beeline_tls_address") if name in {*properties.texts, *properties.addresses}]
    if not given:
        return None
    for name in names:
        if name not in given:
            raise ConfigError(
                f"{properties.path}: {given[0]} is there, {name} is not; TLS needs a certificate and its key, add it"
            )
        if not Path(properties.texts[name]).is_file():
            raise ConfigError(f"{properties.path}: {name} is {properties.texts[name]!r}, which is not there; mount it")
    if choice.kind != "nginx":
        raise ConfigError(f"{properties.path}: TLS needs nginx, and the gateway is {choice.kind}; install nginx")
    certificate, key = (Path(properties.texts[name]).resolve() for name in names)
    return certificate, key
