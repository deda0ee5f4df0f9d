"""Where a server and its gateway listen: public, page, management, metrics, and the server behind them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from beeline.errors import ConfigError
from serve import ports
from serve.ports import Address
from serve.properties import DEFAULTS, VARIABLES, Properties

OPTIONS = {
    "inference": "--port",
    "page": "--page-port",
    "management": "--management-port",
    "metrics": "--metrics-port",
    "tls": "beeline_tls_address in config.properties",
    "backend": "--port",
    "control": "--management-port",
}


@dataclass(frozen=True)
class Ports:
    """The command line's ports; None where one was not given, 0 for a free one."""

    inference: int | None = None
    management: int | None = None
    page: int | None = None
    metrics: int | None = None


@dataclass(frozen=True)
class Addresses:
    """Where everything listens; a port of 0 asks for a free one.

    Attributes:
        inference: predictions, and the page too where there is a gateway.
        management: the management API; behind a gateway its own listener of it, on loopback.
        backend: the server's own inference address: `inference` where there is no gateway.
        control: the server's own management address: `management` where there is no gateway.
        page: a second address of page and API.
        metrics: the exporter's.
        tls: where page and API are spoken in TLS.
    """

    inference: Address
    management: Address
    backend: Address
    control: Address
    page: Address | None = None
    metrics: Address | None = None
    tls: Address | None = None

    @property
    def public(self) -> tuple[Address, ...]:
        """Where the gateway listens without TLS."""
        return (self.inference, *([self.page] if self.page is not None else []))

    @property
    def guarded(self) -> bool:
        """Whether a gateway stands before the server."""
        return self.metrics is not None

    def to_dict(self) -> dict[str, str | None]:
        """Return each as text."""
        return {name: None if address is None else str(address) for name, address in vars(self).items()}


def resolve(properties: Properties, given: Ports, gateway: str) -> Addresses:
    """Decide where everything listens.

    Args:
        properties: the checked file.
        given: the command line's ports.
        gateway: `nginx` or `none`.

    Raises:
        ConfigError: for a port out of range, one address twice, or one that others reach and must not.
    """
    found = {**DEFAULTS, **properties.addresses}
    inference = _with_port(found["inference_address"], given.inference, "--port")
    # Whoever asks for any free port wants no fixed one for anything else either.
    free = 0 if given.inference == 0 else None
    management = _with_port(found["management_address"], _first(given.management, free), "--management-port")
    addresses = Addresses(inference, management, backend=inference, control=management)
    if gateway != "none":
        # With another port for predictions, only what was asked for is taken beside it.
        asked = given.page is not None or given.inference is None
        page = _with_port(found["beeline_page_address"], given.page, "--page-port") if asked else None
        spare = None if given.inference is None else 0
        metrics = _with_port(found["beeline_metrics_address"], _first(given.metrics, spare), "--metrics-port")
        tls = found["beeline_tls_address"] if "beeline_tls_certificate" in properties.texts else None
        anywhere = Address("127.0.0.1", 0)
        addresses = Addresses(inference, management, anywhere, anywhere, page, metrics, tls)
    _check(addresses, gateway, properties)
    return addresses


def settle(addresses: Addresses, highest: int) -> Addresses:
    """Return the addresses with every port of 0 replaced by a free one.

    Args:
        addresses: what was resolved.
        highest: the server's last port.

    Raises:
        BeelineError: when a port is taken. Undetermined: when an address cannot be listened on.
    """
    wanted = {name: address for name, address in vars(addresses).items() if address is not None}
    # Without a gateway the server's own addresses are the public ones.
    if not addresses.guarded:
        del wanted["backend"], wanted["control"]
    settled = ports.settle([(address, OPTIONS[name]) for name, address in wanted.items()], highest)
    found = dict(zip(wanted, settled, strict=True))
    return dataclasses.replace(addresses, **{"backend": found["inference"], "control": found["management"], **found})


def _check(addresses: Addresses, gateway: str, properties: Properties) -> None:
    private = {"management_address": addresses.management, "beeline_metrics_address": addresses.metrics}
    public = {"inference_address": addresses.inference, "beeline_page_address": addresses.page}
    why = "neither server gets security fixes"
    for key, address in {**private, **(public if gateway != "nginx" else {})}.items():
        if address is None or address.loopback or (gateway == "nginx" and key in properties.variables):
            continue
        fix = "or leave --gateway none out: nginx may face a network"
        if key in private:
            # Who sets the variable knows what the network is; a file is copied from machine to machine.
            name = next(name for name, meant in VARIABLES.items() if meant == key)
            fix = f"or, with nginx and on a network of containers alone, the environment variable {name}"
        raise ConfigError(
            f"{properties.source(key)}: {key} is {address}, which other machines may reach, and {why}; "
            f"use {DEFAULTS[key]}, {fix}"
        )
    fixed: dict[Address, str] = {}
    for name, address in vars(addresses).items():
        if address is None or address.port == 0 or name in ("backend", "control"):
            continue
        if address in fixed:
            raise ConfigError(f"{fixed[address]} and {name} are both on {address}; give {OPTIONS[name]} another one")
        fixed[address] = name


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _with_port(address: Address, port: int | None, option: str) -> Address:
    if port is None:
        return address
    if not 0 <= port <= 65_535:
        raise ConfigError(f"{option} is {port}; allowed: a whole number of a port, 0 for a free one, 0 to 65535")
    return dataclasses.replace(address, port=port)
