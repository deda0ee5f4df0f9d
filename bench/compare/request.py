"""What somebody asks to compare: archive, pictures, servers, rounds; carried out, it is a record."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from archive import store
from beeline.errors import ConfigError
from bench import pictures as files
from bench.compare import catalog
from bench.compare.comparison import check, prepared, run
from bench.compare.peer import Numbers, Peer
from bench.compare.process import Process, sweep
from bench.compare.turn import Load
from bench.record import Record, utc
from host import ROOT, machine
from serve import config, properties
from serve.servers.protocol import Say


@dataclass(frozen=True)
class Request:
    """What to compare.

    Attributes:
        archive: what every server serves.
        picture: what is sent, a file or a folder.
        agreement: pictures on which each is asked for its first label; None asks nothing.
        servers: by name; empty means those compared by default.
        clients: of the load.
        rounds: turns of each server.
        seconds: that each turn is measured.
        overrides: numbers of our engine that win over the configuration file.
        reference: an fp32 archive of the same model; None takes the archive itself.
        command: the command line that compares again.
        config_file: the numbers of our engine.
    """

    archive: Path
    picture: Path
    agreement: Path | None = None
    servers: tuple[str, ...] = ()
    clients: int = 50
    rounds: int = 5
    seconds: float = 8.0
    overrides: config.Overrides = field(default_factory=config.Overrides)
    reference: Path | None = None
    command: str = ""
    config_file: Path = ROOT / "config" / "config.properties"

    def peers(self) -> tuple[Peer, ...]:
        """Return all servers, ours with the numbers that `serve up` would take on this machine.

        Raises:
            ArchiveError: for an archive that is not there. ConfigError: for a number out of range.
        """
        found = store.find(self.archive.parent, (str(self.archive),))
        cores = machine.cores()
        read = properties.load(self.config_file, os.environ)
        resolved = config.resolve(read, found, self.overrides, os.environ, cores, gpus=0)
        (model,) = resolved.models
        ours = Numbers(
            model.batch_size.value, model.min_workers.value, model.max_batch_delay.value, resolved.threads.value
        )
        return catalog.everything(found[0].model, cores, ours)

    def known(self) -> dict[str, str]:
        """Return every server's name with what it is."""
        return {peer.name: peer.pattern for peer in self.peers()}


def compare(request: Request, say: Say) -> Record:
    """Compare, and return the record.

    Raises:
        BeelineError: for what does not hold before the first server starts; later a row says it.
    """
    if request.rounds < 1 or request.clients < 1 or request.seconds <= 0:
        given = f"--rounds is {request.rounds}, --clients {request.clients}, --seconds {request.seconds:g}"
        raise ConfigError(f"{given}; give more than 0")
    left = sweep()
    if left:
        say(f"stopped {len(left)} processes that a killed comparison had left: {left}")
    started = utc()
    sent = files.read(request.picture)
    asked = files.read(request.agreement) if request.agreement is not None else None
    peers = catalog.choose(request.peers(), request.servers)
    with prepared(request.archive, request.config_file, request.reference) as bench:
        load = Load(sent, request.clients, request.seconds)
        found = run(peers, bench, load, request.rounds, check(bench, asked), say)
    versions = {name: value for peer in peers for name, value in locked(peer).items()}
    return Record.now("compare", request.command, found, sent, versions, started)


def locked(peer: Peer) -> dict[str, str]:
    """Return the versions that a peer's requirements ask for, by package."""
    return peer.environment.pinned() if isinstance(peer, Process) else {}
