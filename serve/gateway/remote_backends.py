"""One gateway over backends on other hosts, which a name stands for: containers, each with a gateway of its own."""

from __future__ import annotations

import dataclasses
import ipaddress
import logging
import os
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from beeline.errors import ConfigError
from host import machine
from serve import addresses, config, instance, ports, properties
from serve.addresses import Addresses, Ports
from serve.gateway import runtime
from serve.gateway.__main__ import Gateway
from serve.gateway.kinds import choose, public
from serve.gateway.settings import Name
from serve.values import Address

Say = Callable[[str], None]


def run(url: str, config_file: Path, given: Ports, say: Say, environ: Mapping[str, str] = os.environ) -> None:
    """Stand before the backends that a name resolves to, now and later, until told to stop.

    Args:
        url: `http://NAME:PORT` of their gateways; their management is on 8081.
        config_file: where addresses and limits are.
        given: the command line's ports.
        say: takes each line of progress.
        environ: where variables that win over the file, and nginx, are looked for.

    Raises:
        ConfigError: for a URL that is none.
        BeelineError: when a port is taken.
        Undetermined: when there is no nginx, or it refuses its configuration.
    """
    try:
        at = Address.parse(url)
        # A host that no name can be, such as one with two dots in a row, is found out here.
        if at.scheme != "http" or at.port == 0 or not at.host.encode("idna"):
            raise ValueError
    except ValueError as error:
        raise ConfigError(f"--backends is {url!r}; allowed: http://NAME:PORT, such as http://backend:8080") from error
    read = properties.load(config_file, environ)
    choice = choose("nginx", environ)
    wanted = addresses.resolve(read, given, choice.kind)
    told = "beeline_metrics_address" in read.addresses or given.metrics is not None
    settled = _settle(wanted if told else dataclasses.replace(wanted, metrics=None))
    resolved = config.resolve(read, (), config.Overrides(), environ, machine.cores(), 0)
    with instance.own_scratch() as top:
        settings = public(
            choice,
            resolved,
            read,
            folder=top / "gateway",
            listen=settled.public,
            tls=settled.tls,
            backends=(),
            store=None,
            versions=False,
            logs=logs(instance.state_folder(environ)),
            management=settled.management,
            metrics=settled.metrics,
            name=Name(at.host, at.port, addresses.DEFAULTS["management_address"].port),
            management_from=() if settled.management.loopback else _allowed(environ),
        )
        runtime.lay_out(settings)
        say(f"gateway: {choice.sentence}, before {url}")
        say(f"  page and API: {', '.join(str(each.local) for each in settled.public)}; ready when /ping says so")
        for line in resolved.lines()[1:]:
            say(f"  {line}")
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stdout)
        Gateway(settings).run()


def logs(home: Path) -> Path:
    """Return where it logs, below the state folder: no name of a server has a dot."""
    return home / "gateway.logs"


def default_route(table: Path = Path("/proc/net/route")) -> list[str]:
    """Return the address of the router, as the kernel's table has it: in a container, of the machine that runs it.

    What the machine itself sends to a published port comes from there; what another container sends does not.
    """
    try:
        rows = [line.split() for line in table.read_text().splitlines()[1:]]
    except OSError:
        return []
    return [
        socket.inet_ntoa(struct.pack("<L", int(row[2], 16))) for row in rows if int(row[1], 16) == int(row[7], 16) == 0
    ]


def _allowed(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return who may ask for management: the machine that runs the container, and `BEELINE_MANAGEMENT_FROM`."""
    more = [text.strip() for text in environ.get("BEELINE_MANAGEMENT_FROM", "").split(",") if text.strip()]
    try:
        for one in more:
            ipaddress.ip_network(one)
    except ValueError as error:
        raise ConfigError(f"BEELINE_MANAGEMENT_FROM is {','.join(more)!r}; allowed: addresses, with commas") from error
    return ("127.0.0.1", *default_route(), *more)


def _settle(wanted: Addresses) -> Addresses:
    """Return the addresses that this gateway listens on, each port free."""
    names = [
        name for name in ("inference", "page", "management", "metrics", "tls") if getattr(wanted, name) is not None
    ]
    found = ports.settle([(getattr(wanted, name), addresses.OPTIONS[name]) for name in names])
    return Addresses(**{**vars(wanted), **dict(zip(names, found, strict=True))})
