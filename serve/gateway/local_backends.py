"""One gateway over several servers that run on this machine already: they share the load."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path

from archive import store
from archive.mar import Archive
from beeline.errors import BeelineError
from host import machine
from host.files import SHORT, sha256
from serve import addresses, config, instance, ports, properties
from serve.addresses import Ports
from serve.config import Configuration
from serve.gateway import catalog, runtime
from serve.gateway.__main__ import Gateway
from serve.gateway.catalog import Card
from serve.gateway.kinds import choose, public
from serve.gateway.settings import Backend
from serve.instance import State
from serve.servers.protocol import Places, keep
from serve.values import Address

Say = Callable[[str], None]
# Limits of the servers, which a gateway before them can only repeat.
_SERVERS_OWN = (
    "job_queue_size", "beeline_max_image_bytes", "beeline_max_image_pixels", "beeline_deadline_seconds"
)  # fmt: skip


def run(
    names: Sequence[str],
    config_file: Path,
    given: Ports,
    say: Say,
    card: Card | None = None,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Stand before the named servers until told to stop; they run on.

    Args:
        names: the servers', each started by `beeline serve up --name`.
        config_file: where addresses and limits are.
        given: the command line's ports.
        say: takes each line of progress.
        card: reads an archive's card for the page.
        environ: where the state folder and nginx are looked for.

    Raises:
        BeelineError: when one does not run, or they do not serve the same.
        Undetermined: when nginx refuses its configuration.
    """
    home = instance.state_folder(environ)
    states = [instance.running(home, name)[1] for name in dict.fromkeys(names)]
    check_same(states)
    read = properties.load(config_file, environ)
    choice = choose("auto", environ)
    wanted = addresses.resolve(read, given, choice.kind)
    told = wanted.metrics if "beeline_metrics_address" in read.addresses or given.metrics is not None else None
    *listen, metrics = ports.settle(
        [
            *zip(wanted.public, ("--port", "--page-port"), strict=False),
            (told or Address("127.0.0.1", 0), "--metrics-port"),
        ]
    )
    own = config.resolve(read, (), config.Overrides(), environ, machine.cores(), 0)
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
        archives = store.find(served)
        resolved = common(own, states, archives)
        settings = public(
            choice,
            resolved,
            read,
            folder=top / "gateway",
            listen=tuple(listen),
            tls=wanted.tls,
            backends=tuple(
                Backend(state.backend, state.management, str(Places(Path(state.temporary), top).metrics))
                for state in states
            ),
            store=served,
            versions=all(state.server == "torchserve" for state in states),
            logs=top / "logs",
            metrics=told and metrics,
        )
        runtime.lay_out(settings)
        built = {name: Path(path) for name, path in states[0].archives.items()}
        catalog.write(settings, resolved, archives, built, states[0].server, card)
        say(f"gateway: {choice.sentence}")
        say(f"before {', '.join(f'{state.name} ({state.backend})' for state in states)}: {listen[0].local}")
        if told is not None:
            say(f"metrics, the gateway's own answers alone: {metrics}/metrics")
        say("Ctrl-C stops it, and not the servers.")
        Gateway(settings).run()


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
