"""One gateway over several servers that run on this machine already: they share the load."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from beeline.errors import BeelineError
from serve import addresses, config, instance, machine, ports, properties, store
from serve.addresses import Ports
from serve.gateway import catalog, layout
from serve.gateway.__main__ import Gateway
from serve.gateway.catalog import Card
from serve.gateway.choice import choose, public
from serve.gateway.settings import Backend
from serve.instance import State

Say = Callable[[str], None]


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
    listen = ports.settle(zip(wanted.public, ("--port", "--page-port"), strict=False))
    served = Path(states[0].temporary) / "store"
    archives = store.find(served)
    resolved = config.resolve(read, archives, config.Overrides(), environ, machine.cores(), 0)
    with instance.own_scratch() as top:
        settings = public(
            choice,
            resolved,
            read,
            folder=top / "gateway",
            listen=tuple(listen),
            tls=wanted.tls,
            backends=tuple(Backend(state.backend, state.management) for state in states),
            store=served,
            versions=all(state.server == "torchserve" for state in states),
            logs=top / "logs",
        )
        layout.lay_out(settings)
        originals = Path(next(iter(states[0].archives.values()))).parent
        catalog.write(settings, resolved, archives, originals, states[0].server, card)
        say(f"gateway: {choice.sentence}")
        say(f"before {', '.join(f'{state.name} ({state.backend})' for state in states)}: {listen[0].local}")
        say("Ctrl-C stops it, and not the servers.")
        Gateway(settings).run()


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
