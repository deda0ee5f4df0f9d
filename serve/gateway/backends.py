"""A gateway in front of running servers: named ones on this machine, or those on other hosts behind one name."""

from __future__ import annotations

import dataclasses
import ipaddress
import logging
import socket
import struct
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path

from archive import store
from archive.mar import Archive
from beeline.errors import BeelineError, ConfigError
from beeline.metrics import FOLDER
from host import machine
from host.files import SHORT, sha256
from serve import addresses, config, instance, properties, servers
from serve.addresses import Addresses, Ports
from serve.config import Configuration, Setting
from serve.gateway import catalog, runtime
from serve.gateway.__main__ import Gateway
from serve.gateway.catalog import Card
from serve.gateway.nginx import Choice, choose
from serve.gateway.settings import Backend, Name, public
from serve.instance import State
from serve.ports import Address
from serve.properties import Properties
from serve.servers.protocol import Say, keep

# The limits of the servers, which the gateway must not exceed.
_LIMITS = ["job_queue_size", "beeline_max_image_bytes", "beeline_max_image_pixels", "beeline_deadline_seconds"]
_LIMITS += ["beeline_heap_megabytes"]


def share(
    names: Sequence[str], config_file: Path, given: Ports, say: Say, card: Card, environ: Mapping[str, str]
) -> None:
    """Run a gateway in front of servers of this machine until a signal stops it; the servers run on.

    The names are those of `beeline serve up --name`. The command line's ports win over `environ`, which wins over the
    file. It raises BeelineError when a server does not run or they serve different archives, and Undetermined when
    there is no nginx or it refuses its configuration.
    """
    found = [instance.running(instance.state_folder(environ), name) for name in dict.fromkeys(names)]
    states = [state for _, state in found]
    check_same(states)
    kind = servers.named(states[0].server)
    # Each server has its own management; this gateway has none, so it must not take the usual port.
    read, choice, at, own = _decide(config_file, dataclasses.replace(given, management=0), environ)
    with _scratch(instance.state_folder(environ)) as top:
        # Copies, since the server may stop first.
        served = top / "store"
        served.mkdir(mode=0o700)
        try:
            for name in states[0].archives:
                keep(states[0].store / name, served / name)
        except OSError as error:
            message = f"the archives of {states[0].name} cannot be copied ({error}); name servers that run"
            raise BeelineError(message) from error
        archives = store.find_archives(served)
        resolved = common(own, states, archives)
        settings = public(
            choice,
            resolved,
            read,
            at,
            folder=top / "gateway",
            management=None,
            backends=tuple(
                Backend(state.backend, state.management, state.environment.get(FOLDER), str(each.failed))
                for each, state in found
            ),
            store=served,
            versions=kind.versions,
            logs=top / "logs",
        )
        runtime.lay_out(settings)
        built = {name: Path(path) for name, path in states[0].archives.items()}
        catalog.write(settings, resolved, archives, built, kind.title, card)
        say(f"gateway: {choice.sentence}")
        say(f"in front of {', '.join(f'{state.name} ({state.backend})' for state in states)}: {at.inference.local}")
        if at.metrics is not None:
            say(f"metrics, of the gateway's own answers only: {at.metrics}/metrics")
        say("Ctrl-C stops it, but not the servers.")
        Gateway(settings).run()


def discover(url: str, config_file: Path, given: Ports, say: Say, environ: Mapping[str, str]) -> None:
    """Run a gateway in front of the backends behind a name, now and later, until a signal stops it.

    The arguments are those of `share`, but for `url`: `http://NAME:PORT` of the gateways behind the name, whose
    management is on 8081. It raises the same, and ConfigError for a URL of another form.
    """
    try:
        to = Address.parse(url)
        # `encode` raises for an impossible name, such as one with two dots in a row.
        if to.scheme != "http" or to.port == 0 or not to.host.encode("idna"):
            raise ValueError
    except ValueError as error:
        raise ConfigError(f"--backends is {url!r}; allowed: http://NAME:PORT, such as http://backend:8080") from error
    read, choice, at, resolved = _decide(config_file, given, environ)
    with _scratch(instance.state_folder(environ)) as top:
        settings = public(
            choice,
            resolved,
            read,
            at,
            folder=top / "gateway",
            logs=logs(instance.state_folder(environ)),
            # The backends' own gateways know their heaps.
            places={},
            name=Name(to.host, to.port, properties.DEFAULTS["management_address"].port),
            management_from=() if at.management.loopback else _allowed(environ),
        )
        runtime.lay_out(settings)
        say(f"gateway: {choice.sentence}, in front of {url}")
        say(f"  page and API: {', '.join(str(each.local) for each in at.public)}; ready when /ping says so")
        for line in resolved.lines()[1:]:
            say(f"  {line}")
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stdout)
        Gateway(settings).run()


def logs(home: Path) -> Path:
    """Return the log folder of a gateway in front of a name; no server's folder has a dot in its name."""
    return home / "gateway.logs"


def _decide(
    config_file: Path, given: Ports, environ: Mapping[str, str]
) -> tuple[Properties, Choice, Addresses, Configuration]:
    """Return the file, nginx, free addresses and limits; metrics have an address only where the file gives one."""
    read = properties.load(config_file, environ)
    choice = choose("auto", environ)
    wanted = addresses.resolve(read, given, choice.kind)
    if "beeline_metrics_address" not in read.addresses:
        wanted = dataclasses.replace(wanted, metrics=None)
    own = config.resolve(read, (), config.Overrides(), environ, machine.cores(), 0, 0)
    return read, choice, addresses.settle(wanted, 65_535), own


@contextmanager
def _scratch(home: Path) -> Iterator[Path]:
    """Yield a temporary folder that nginx's workers may enter, below `home` where they may enter that."""
    home.mkdir(parents=True, exist_ok=True)
    above = instance.scratch(f"{home}:").parent
    with tempfile.TemporaryDirectory(prefix="beeline-", dir=above, ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


def common(own: Configuration, states: Sequence[State], archives: Sequence[Archive]) -> Configuration:
    """Return the servers' models, in the order of `archives`, the lowest of each limit, and the rest from `own`."""
    first = states[0].configuration
    models = {model["archive"]: config.model_settings(model) for model in first["models"]}
    limits = {
        name: min((Setting(**state.configuration["numbers"][name]) for state in states), key=attrgetter("value"))
        for name in _LIMITS
    }
    rate = "beeline_requests_per_second"
    if own.numbers[rate].reason == config.RATE:
        limits[rate] = Setting(10 * limits["job_queue_size"].value, config.RATE)
    served = tuple(models[archive.path.name] for archive in archives)
    return Configuration(served, Setting(**first["threads"]), {**own.numbers, **limits}, own.vmargs)


def check_same(states: Sequence[State]) -> None:
    """Raise BeelineError, naming two servers, unless all are of one kind and serve the same archives."""
    first = states[0]
    needs = "one gateway needs servers that serve the same"
    for state in states[1:]:
        if (state.server, sorted(state.archives)) != (first.server, sorted(first.archives)):
            served = [f"{one.name} ({one.server}) serves {', '.join(sorted(one.archives))}" for one in (state, first)]
            raise BeelineError(f"{', '.join(served)}; {needs}: name others, or start one again with the same archives")
        for file in sorted(state.archives):
            one, other = (sha256(each.store / file)[:SHORT] for each in (state, first))
            if one != other:
                differ = f"{state.name} serves {file} with sha256 {one}, {first.name} with {other}"
                raise BeelineError(f"{differ}; {needs}: start the older one again")


def default_route(table: Path = Path("/proc/net/route")) -> list[str]:
    """Return the router's address from the kernel's table; in a container, that is the machine that runs it.

    Requests from that machine to a published port have this address; those of other containers have not.
    """
    try:
        rows = [line.split() for line in table.read_text().splitlines()[1:]]
    except OSError:
        return []
    routers = [int(row[2], 16) for row in rows if int(row[1], 16) == int(row[7], 16) == 0]
    return [socket.inet_ntoa(struct.pack("<L", router)) for router in routers]


def _allowed(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return who may use management: the machine that runs the container, and `BEELINE_MANAGEMENT_FROM`."""
    more = [text.strip() for text in environ.get("BEELINE_MANAGEMENT_FROM", "").split(",") if text.strip()]
    try:
        for one in more:
            ipaddress.ip_network(one)
    except ValueError as error:
        message = f"BEELINE_MANAGEMENT_FROM is {','.join(more)!r}; allowed: addresses, separated by commas"
        raise ConfigError(message) from error
    return ("127.0.0.1", *default_route(), *more)
