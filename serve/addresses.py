"""The addresses of a server and its gateway: predictions, page, management, metrics, and the server behind them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from beeline.errors import ConfigError
from serve import ports
from serve.ports import Address
from serve.properties import DEFAULTS, VARIABLES, Properties

_OPTIONS = {
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
    """Where each part listens; a port of 0 asks for a free one."""

    # For clients: predictions, with a gateway the page too; and management.
    inference: Address
    management: Address
    # The server's own two; without a gateway they are the clients'.
    backend: Address
    control: Address
    # Of a gateway: a second address of page and API, the exporter, page and API over TLS.
    page: Address | None = None
    metrics: Address | None = None
    tls: Address | None = None

    @property
    def public(self) -> tuple[Address, ...]:
        """The gateway's listeners without TLS."""
        return (self.inference, *([self.page] if self.page is not None else []))

    def to_dict(self) -> dict[str, str | None]:
        """Return each address as text."""
        return {name: None if address is None else str(address) for name, address in vars(self).items()}


def resolve(properties: Properties, given: Ports, gateway: str) -> Addresses:
    """Decide where everything listens; `gateway` is `nginx` or `none`.

    Raise ConfigError for a port out of range, an address that is used twice, or a private one that others can reach.
    """
    known: dict[str, Address] = {**DEFAULTS, **properties.addresses}

    def address(key: str, option: str, port: int | None, default: int | None = None) -> Address:
        """Return an address with the option's port, else with the default port, else as it is."""
        port = default if port is None else port
        if port is None:
            return known[key]
        if not 0 <= port <= 65_535:
            raise ConfigError(f"{option} is {port}; allowed: a whole number of a port, 0 for a free one, 0 to 65535")
        return dataclasses.replace(known[key], port=port)

    inference = address("inference_address", "--port", given.inference)
    # If predictions get a free port, everything does.
    free = 0 if given.inference == 0 else None
    management = address("management_address", "--management-port", given.management, free)
    addresses = Addresses(inference, management, backend=inference, control=management)
    if gateway != "none":
        # If the port for predictions is given, there is no second port for the page, and metrics get a free one.
        has_page = given.page is not None or given.inference is None
        page = address("beeline_page_address", "--page-port", given.page) if has_page else None
        spare = None if given.inference is None else 0
        metrics = address("beeline_metrics_address", "--metrics-port", given.metrics, spare)
        tls = known["beeline_tls_address"] if "beeline_tls_certificate" in properties.texts else None
        anywhere = Address("127.0.0.1", 0)
        addresses = Addresses(inference, management, anywhere, anywhere, page, metrics, tls)
    _check(addresses, gateway, properties)
    return addresses


def settle(addresses: Addresses, highest: int, free: range = ports.FREE) -> Addresses:
    """Return the addresses with a free port for each 0; see `ports.settle`."""
    listeners = {name: address for name, address in vars(addresses).items() if address is not None}
    # Without a gateway the server's own addresses are the public ones.
    if addresses.metrics is None:
        del listeners["backend"], listeners["control"]
    settled = ports.settle([(address, _OPTIONS[name]) for name, address in listeners.items()], highest, free)
    new = dict(zip(listeners, settled, strict=True))
    return dataclasses.replace(addresses, **{"backend": new["inference"], "control": new["management"], **new})


def _check(addresses: Addresses, gateway: str, properties: Properties) -> None:
    # Neither server gets security fixes, so only nginx may face a network; and only containers' for management.
    checked = {"management_address": addresses.management, "beeline_metrics_address": addresses.metrics}
    if gateway != "nginx":
        checked |= {"inference_address": addresses.inference, "beeline_page_address": addresses.page}
    for key, address in checked.items():
        # A variable is set for one network; a file is copied from machine to machine.
        if address is None or address.loopback or (gateway == "nginx" and key in properties.variables):
            continue
        fix = "or leave --gateway none out: nginx may face a network"
        if key not in ("inference_address", "beeline_page_address"):
            name = next(name for name, meant in VARIABLES.items() if meant == key)
            fix = f"or, with nginx and on a network of containers only, the environment variable {name}"
        raise ConfigError(
            f"{properties.source(key)}: {key} is {address}, which other machines may reach, and neither server gets "
            f"security fixes; use {DEFAULTS[key]}, {fix}"
        )
    fixed: dict[Address, str] = {}
    for name, address in vars(addresses).items():
        if address is None or address.port == 0 or name in ("backend", "control"):
            continue
        if address in fixed:
            raise ConfigError(f"{fixed[address]} and {name} are both on {address}; give {_OPTIONS[name]} another one")
        fixed[address] = name
