"""Stop servers on this machine, and what dead ones left."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from beeline.errors import Undetermined
from serve import instance
from serve.instance import Instance

# A supervisor gives Java ten seconds, workers five; then it kills.
_PATIENCE = 30.0


@dataclass(frozen=True)
class Stopped:
    """One server that was stopped; `leftovers` are the ids of processes that a dead supervisor had left."""

    name: str
    leftovers: tuple[int, ...] = ()


def down(home: Path, name: str | None = None, every: bool = False) -> list[Stopped]:
    """Stop the server of that name, or the only one, or every one; then sweep what dead ones left.

    Raises:
        BeelineError: when there is nothing to stop, or several and neither a name nor `every`.
        Undetermined: when one does not end.
    """
    swept = [Stopped(found, tuple(pids)) for found, pids in instance.sweep_dead(home).items()]
    alive = [found for found in instance.known(home) if found.alive()]
    if every:
        targets = alive
    elif not alive and any(name in (None, item.name) for item in swept):
        targets = []
    else:
        targets = [instance.running(home, name)[0]]
    return swept + [_stop(target) for target in targets]


def _stop(target: Instance) -> Stopped:
    deadline = time.monotonic() + _PATIENCE
    asked = False
    while target.alive():
        state = target.read()
        # The state names the supervisor as soon as that holds the lock alone; only then is its id sure.
        if not asked and state is not None and state.supervisor is not None:
            try:
                os.kill(state.supervisor, signal.SIGTERM)
                asked = True
            except ProcessLookupError:
                # It ended in this instant; `alive` will say so.
                continue
        if time.monotonic() > deadline:
            raise Undetermined(
                f"the server {target.name!r} does not end (supervisor {state.supervisor if state else 'unknown'}); "
                f"see {target.logs / 'supervisor.log'}"
            )
        time.sleep(0.05)
    return Stopped(target.name)
