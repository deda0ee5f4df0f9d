"""A gateway before servers that run already: some of this machine, or those of other hosts behind one name."""

from __future__ import annotations

import dataclasses
import ipaddress
import logging
import os
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path

from archive import store
from archive.mar import Archive
from beeline.errors import BeelineError, ConfigError
from beeline.metrics import FOLDER
from host import machine
from host.files import SHORT, sha256
from serve import addresses, config, instance, properties
from serve.addresses import Addresses, Ports
from serve.config import Configuration
from serve.gateway import catalog, runtime
from serve.gateway.__main__ import Gateway
from serve.gateway.catalog import Card
from serve.gateway.nginx import Choice, choose
from serve.gateway.settings import Backend, Name, public
from serve.instance import State
from serve.ports import Address
from serve.properties import Properties
from serve.servers.protocol import Places, Say, keep

# Limits of the servers, which a gateway before them can only repeat.
_SERVERS_OWN = (
    "job_queue_size", "beeline_max_image_bytes", "beeline_max_image_pixels", "beeline_deadline_seconds"
)  # fmt: skip


def share(
    names: Sequence[str],
    config_file: Path,
    given: Ports,
    say: Say,
    card: Card | None = None,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Stand before the named servers of this machine until told to stop; they share the load, and run on.

    Args:
        names: the servers', each started by `beeline serve up --name`.
        config_file: where addresses and limits are.
        given: the command line's ports.
        say: takes each line of progress.
        card: reads an archive's card for the page.
        environ: where the state folder and nginx are looked for.

    Raises:
        BeelineError: when one does not run, or they do not serve the same.
        Undetermined: when there is no nginx, or it refuses its configuration.
    """
    home = instance.state_folder(environ)
    states = [instance.running(home, name)[1] for name in dict.fromkeys(names)]
    check_same(states)
    read, choice, wanted, own = _decide(config_file, given, environ)
    # Each server has a management of its own, which this gateway has none for.
    at = addresses.settle(dataclasses.replace(wanted, management=Address("127.0.0.1", 0)), 65_535)
    with instance.own_scratch() as top:
        # The server whose they are may end before this gateway does.
        served = top / "store"
        served.mkdir(mode=0o700)
        try:
            for name in states[0].archives:
                keep(store_of(states[0]) / name, served / name)
        except OSError as error:
            raise BeelineError(
                f"the archives of {states[0].name} cannot be kept ({error}); it may have been stopped meanwhile: name "
                "servers that run"
            ) from error
        archives = store.find_archives(served)
        resolved = common(own, states, archives)
        settings = public(
            choice,
            resolved,
            read,
            folder=top / "gateway",
            listen=at.public,
            tls=at.tls,
            backends=tuple(Backend(state.backend, state.management, state.environment.get(FOLDER)) for state in states),
            store=served,
            versions=all(state.server == "torchserve" for state in states),
            logs=top / "logs",
            metrics=at.metrics,
        )
        runtime.lay_out(settings)
        built = {name: Path(path) for name, path in states[0].archives.items()}
        catalog.write(settings, resolved, archives, built, states[0].server, card)
        say(f"gateway: {choice.sentence}")
        say(f"before {', '.join(f'{state.name} ({state.backend})' for state in states)}: {at.inference.local}")
        if at.metrics is not None:
            say(f"metrics, the gateway's own answers alone: {at.metrics}/metrics")
        say("Ctrl-C stops it, and not the servers.")
        Gateway(settings).run()


def discover(url: str, config_file: Path, given: Ports, say: Say, environ: Mapping[str, str] = os.environ) -> None:
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
        to = Address.parse(url)
        # A host that no name can be, such as one with two dots in a row, is found out here.
        if to.scheme != "http" or to.port == 0 or not to.host.encode("idna"):
            raise ValueError
    except ValueError as error:
        raise ConfigError(f"--backends is {url!r}; allowed: http://NAME:PORT, such as http://backend:8080") from error
    read, choice, wanted, resolved = _decide(config_file, given, environ)
    at = addresses.settle(wanted, 65_535)
    with instance.own_scratch() as top:
        settings = public(
            choice,
            resolved,
            read,
            folder=top / "gateway",
            listen=at.public,
            tls=at.tls,
            backends=(),
            store=None,
            versions=False,
            logs=logs(instance.state_folder(environ)),
            management=at.management,
            metrics=at.metrics,
            name=Name(to.host, to.port, properties.DEFAULTS["management_address"].port),
            management_from=() if at.management.loopback else _allowed(environ),
        )
        runtime.lay_out(settings)
        say(f"gateway: {choice.sentence}, before {url}")
        say(f"  page and API: {', '.join(str(each.local) for each in at.public)}; ready when /ping says so")
        for line in resolved.lines()[1:]:
            say(f"  {line}")
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stdout)
        Gateway(settings).run()


def logs(home: Path) -> Path:
    """Return where one before a name logs, below the state folder: no name of a server has a dot."""
    return home / "gateway.logs"


def _decide(
    config_file: Path, given: Ports, environ: Mapping[str, str]
) -> tuple[Properties, Choice, Addresses, Configuration]:
    """Return file, nginx, addresses and limits; metrics have an address only where somebody gave one."""
    read = properties.load(config_file, environ)
    choice = choose("auto", environ)
    wanted = addresses.resolve(read, given, choice.kind)
    if "beeline_metrics_address" not in read.addresses:
        wanted = dataclasses.replace(wanted, metrics=None)
    return read, choice, wanted, config.resolve(read, (), config.Overrides(), environ, machine.cores(), 0)


def common(own: Configuration, states: Sequence[State], archives: Sequence[Archive]) -> Configuration:
    """Return the gateway's configuration with what the servers really run with, and no more than each of them takes.

    Args:
        own: what the gateway's own file says, for all that is not the servers'.
        states: the servers'.
        archives: what they serve; the models come in this order.
    """
    first = states[0].configuration
    models = {model["archive"]: config.model_settings(model) for model in first["models"]}
    limits = {
        name: min((config.Setting(**state.configuration["numbers"][name]) for state in states), key=attrgetter("value"))
        for name in _SERVERS_OWN
    }
    rate = "beeline_requests_per_second"
    if own.numbers[rate].reason == config.RATE:
        limits[rate] = config.Setting(10 * limits["job_queue_size"].value, config.RATE)
    threads = config.Setting(**first["threads"])
    return Configuration(
        tuple(models[archive.path.name] for archive in archives), threads, {**own.numbers, **limits}, own.vmargs
    )


def check_same(states: Sequence[State]) -> None:
    """Do nothing where all serve the same archives by the same kind of server.

    Raises:
        BeelineError: naming two that do not.
    """
    first = states[0]
    for state in states[1:]:
        if (state.server, sorted(state.archives)) != (first.server, sorted(first.archives)):
            raise BeelineError(
                f"{state.name} ({state.server}) serves {', '.join(sorted(state.archives))}, {first.name} "
                f"({first.server}) {', '.join(sorted(first.archives))}; one gateway needs servers that serve the same"
            )
        for file in sorted(state.archives):
            digests = [sha256(store_of(one) / file) for one in (state, first)]
            if digests[0] != digests[1]:
                raise BeelineError(
                    f"{state.name} serves {file} with sha256 {digests[0][:SHORT]}, {first.name} another one with "
                    f"{digests[1][:SHORT]}; one gateway needs servers that serve the same: start the older one again"
                )


def store_of(state: State) -> Path:
    """Return the folder with what a server serves, as it was when it started."""
    return Places(Path(state.temporary), Path()).store


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
