"""Start a server and wait until it answers; it ends with this process unless it is detached."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from archive import store
from archive.mar import Archive
from beeline.errors import BeelineError, Undetermined
from beeline.metrics import FOLDER
from host import ROOT, machine
from host.files import write_json
from serve import addresses, config, counts, instance, properties, servers
from serve.addresses import Addresses, Ports
from serve.client import InferenceClient, ManagementClient
from serve.config import ModelSettings
from serve.gateway import catalog, runtime
from serve.gateway.catalog import Card
from serve.gateway.nginx import Choice, choose
from serve.gateway.settings import Backend, adapted, public, tls_files
from serve.instance import Instance, State
from serve.instance.child import Running
from serve.ports import FREE
from serve.ready import Watch, try_golden, wait_for_workers
from serve.servers import protocol
from serve.servers.protocol import Places, Runtime, Say, Server

# Seconds for the server, before it loads a model, and for the gateway.
_PATIENCE = 60.0
# TorchServe unpacks all archives before it answers: on a busy core 2.2 GB took 100 s, which is so many bytes a second.
_UNPACKED = 2e7


@dataclass(frozen=True)
class Request:
    """What to start: these options of `beeline serve up`.

    `wanted` names archives in the store, or paths of `.mar` files; empty means all in the store. `card` reads an
    archive's card for the page. With `listed`, archives that the store's index does not list are refused. With
    `invocations`, `POST /invocations` is a prediction of the only model. `free` are the ports to choose free ones from.
    """

    server: str = "torchserve"
    wanted: tuple[str, ...] = ()
    store: Path = ROOT / "model_store"
    config_file: Path = ROOT / "config" / "config.properties"
    name: str = instance.DEFAULT_NAME
    overrides: config.Overrides = field(default_factory=config.Overrides)
    ports: Ports = field(default_factory=Ports)
    gateway: str = "auto"
    card: Card | None = None
    listed: bool = False
    invocations: bool = False
    free: range = FREE


def up(request: Request, say: Say, environ: Mapping[str, str] = os.environ) -> Running:
    """Start a server and return when it is ready; `say` gets each line of progress.

    Variables in `environ` win over the file, and the server inherits it. After an error nothing is left running.

    Raises:
        BeelineError: for an empty store, a taken port, a worker that refuses its archive, and other mistakes.
        Undetermined: if nginx or what runs the server is missing, or nothing answers in time.
    """
    began = time.monotonic()
    kind = servers.named(request.server)
    home = instance.state_folder(environ)
    target = instance.named(home, request.name)
    read, gateway, listeners = _listeners(request, environ)
    archives = _archives(kind, request, read, say)
    gpus = 0 if environ.get("BEELINE_DEVICE") == "cpu" else len(machine.gpus())
    resolved = config.resolve(read, archives, request.overrides, environ, machine.cores(), gpus, machine.free_memory())
    runtime = kind.prepare(say, environ)
    for name, stopped in instance.sweep_dead(home).items():
        say(f"stopped {len(stopped)} processes that the dead server {name!r} left: {stopped}")
    lock = target.lock()
    if lock is None:
        raise BeelineError(
            f"a server named {request.name!r} is running; stop it with `beeline serve down`, or give another --name"
        )
    try:
        target.sweep()
        settled = addresses.settle(listeners, kind.highest_port, request.free)
        started = _Start(target, kind, resolved, settled, archives, gateway, read, request, runtime)
        try:
            running = _spawn(started, lock, environ)
        except BaseException:
            target.sweep()
            raise
    finally:
        # A supervisor that runs holds the same lock.
        os.close(lock)
    try:
        say(f"{kind.title} starts on {settled.backend}, with management on {settled.management}; {runtime.sentence}")
        say(f"gateway: {gateway.sentence}")
        for line in resolved.lines():
            say(f"  {line}")
        if policy := running.state.environment.get("OMP_WAIT_POLICY"):
            say(
                f"  OMP_WAIT_POLICY {policy} (with a quota of CPU time, PASSIVE unless the environment has another one)"
            )
        if not (settled.management.loopback or "beeline_management_token" in read.texts):
            say(f"warning: who reaches {settled.management} may scale; BEELINE_MANAGEMENT_TOKEN asks for a token")
        with target.audited(f"up {', '.join(archive.path.name for archive in archives)}"):
            _wait(running, started, say)
            running.ready()
    except BaseException:
        running.stop()
        raise
    running.seconds = time.monotonic() - began
    return running


def check_ports(request: Request, environ: Mapping[str, str] = os.environ) -> None:
    """Raise what `up` would raise now for a mistake in the file or a taken port."""
    addresses.settle(_listeners(request, environ)[2], servers.named(request.server).highest_port)


def _listeners(request: Request, environ: Mapping[str, str]) -> tuple[properties.Properties, Choice, Addresses]:
    """Return the checked file, the gateway, and where each part shall listen."""
    read = properties.load(request.config_file, environ)
    gateway = choose(request.gateway, environ)
    tls_files(gateway, read)
    adapted(gateway, read)
    return read, gateway, addresses.resolve(read, request.ports, gateway.kind)


def _archives(kind: Server, request: Request, read: properties.Properties, say: Say) -> tuple[Archive, ...]:
    trusted = read.texts.get("beeline_trusted_key", "")
    archives = store.find_archives(request.store, request.wanted, request.listed, trusted)
    if not kind.versions:
        every, archives = archives, config.defaults(archives, read)
        if left := [f"{one.model} {one.version}" for one in every if one not in archives]:
            say(f"{kind.title} serves one version of a model, its default; not served: {', '.join(left)}")
    files = [archive.path.name for archive in archives]
    if len(set(files)) < len(files):
        raise BeelineError(f"two archives have the same file name ({', '.join(files)}); rename one")
    return archives


@dataclass(frozen=True)
class _Start:
    """Everything that was decided for one start."""

    target: Instance
    kind: Server
    resolved: config.Configuration
    addresses: Addresses
    archives: tuple[Archive, ...]
    gateway: Choice
    properties: properties.Properties
    request: Request
    runtime: Runtime


def _spawn(start: _Start, lock: int, environ: Mapping[str, str]) -> Running:
    """Write the state and the files, and start the supervisor with the lock and a pipe."""
    target, kind, resolved = start.target, start.kind, start.resolved
    mark = target.new_mark()
    places = Places(instance.scratch(mark), target.logs, instance.short_path(mark))
    heap = f"-Xmx{resolved.numbers['beeline_heap_megabytes'].value}m"
    state = State(
        name=target.name,
        server=kind.name,
        mark=mark,
        inference=str(start.addresses.inference.local),
        management=str(start.addresses.control),
        backend=str(start.addresses.backend),
        addresses=start.addresses.to_dict(),
        gateway_kind=start.gateway.kind,
        gateway_program=start.gateway.sentence,
        gateway=[sys.executable, "-m", "serve.gateway", str(places.gateway)] if start.gateway.kind != "none" else [],
        temporary=str(places.temporary),
        short=str(places.short),
        command=kind.command(start.runtime, places, f"{heap} {resolved.vmargs}"),
        environment=protocol.environment(kind, start.runtime.python, resolved, places),
        archives={archive.path.name: str(archive.path.resolve()) for archive in start.archives},
        configuration=resolved.to_dict(),
        started=time.time(),
        grace=resolved.stop_grace,
        revive=kind.patient,
    )
    target.clear()
    target.write(state)
    protocol.lay_out(kind, resolved, start.addresses, start.archives, places)
    if state.gateway:
        settings = public(
            start.gateway,
            resolved,
            start.properties,
            start.addresses,
            folder=places.gateway,
            backends=(Backend(state.backend, state.management, str(places.metrics), str(target.failed)),),
            store=places.store,
            versions=kind.versions,
            logs=places.logs,
            worker_metrics=places.metrics,
            invocations=start.archives[0].model if start.request.invocations else "",
        )
        runtime.lay_out(settings)
        built = {archive.path.name: archive.path for archive in start.archives}
        catalog.write(settings, resolved, start.archives, built, kind.title, start.request.card)
    read, write = os.pipe()
    try:
        with (target.logs / "supervisor.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "serve.instance.supervisor", str(target.folder), str(lock), str(read)],
                env=protocol.clean(environ),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lock, read),
                # A terminal's Ctrl-C must reach only the command in the foreground.
                start_new_session=True,
            )
    finally:
        os.close(read)
    return Running(target, state, process, write)


def _wait(running: Running, start: _Start, say: Say) -> None:
    """Wait for the server, for every model's workers and its golden picture, and for the gateway.

    Only as many workers load at a time as there are cores. A model that does not start harms no other one.
    """
    models = start.resolved.models
    with ManagementClient(running.state.management) as management:
        unpacked = sum(archive.path.stat().st_size for archive in start.archives)
        _wait_for(running, start.kind.title, management.unready, _PATIENCE + unpacked / _UNPACKED)
    most = max(model.min_workers.value for model in models)
    pool = ThreadPoolExecutor(max(1, machine.cores() // most), thread_name_prefix="load")
    failed: dict[str, str] = {}
    try:
        pairs = zip(models, start.archives, strict=True)
        loads = {pool.submit(_load, running, start, model, archive): model for model, archive in pairs}
        for load in as_completed(loads):
            try:
                say(load.result())
            except BeelineError as error:
                running.check()
                failed[f"{loads[load].model}/{loads[load].version}"] = str(error)
                if len(failed) == len(models):
                    raise
                write_json(running.instance.failed, failed)
                say(f"warning: {loads[load].model} {loads[load].version} is not served: {error}")
    finally:
        # After an error the server stops, which ends the threads.
        pool.shutdown(wait=False, cancel_futures=True)
    serving = {(one.model, one.version) for one in models if f"{one.model}/{one.version}" not in failed}
    if silent := serving - counts.read(Path(running.state.environment[FOLDER])).counting():
        say(
            f"warning: {', '.join(sorted(name for name, _ in silent))} is served without metrics: an older Beeline "
            "built its archive, or it has another handler; for metrics build it again (`beeline archive build`)"
        )
    if running.state.gateway:
        with InferenceClient(running.state.inference, timeout=5, patience=0) as client:
            _wait_for(running, "the gateway", client.unready)


def _load(running: Running, start: _Start, model: ModelSettings, archive: Archive) -> str:
    """Start a model's workers and try its golden picture; return a sentence on the result."""
    assert running.state.server_process is not None
    kind, workers = start.kind, model.min_workers.value
    watch = Watch(running.state.server_process, running.instance.logs, model.model, model.version)
    version = model.version if kind.versions else None
    fix = partial(kind.advice, archive, start.runtime.python)
    with ManagementClient(running.state.management) as management, InferenceClient(running.state.backend) as inference:
        try:
            kind.register(management, model)
        except BeelineError as error:
            running.check()
            why = watch.why(patience=15)
            raise BeelineError(f"{model.model} does not start: {why} ({error}); {fix(why)}") from error
        try:
            patience = model.startup_timeout.value
            wait_for_workers(management, model.model, version, workers, watch, patience, running.check, fix)
            return f"{try_golden(inference, archive, version)}; workers: {workers}"
        except BeelineError:
            # TorchServe would start it again and again.
            with suppress(BeelineError):
                management.scale(kind.path(model), 0, 0)
            raise


def _wait_for(running: Running, what: str, missing: Callable[[], str | None], patience: float = _PATIENCE) -> None:
    """Wait until `missing` returns None instead of what is missing."""
    deadline, state = time.monotonic() + patience, None
    while (reason := missing()) is not None or (state := running.instance.read()) is None:
        running.check()
        if running.process.poll() is not None:
            raise BeelineError(f"the server {running.instance.name!r} was stopped while it started")
        if time.monotonic() > deadline:
            raise Undetermined(f"{what} is not ready after {patience:.0f} s ({reason}); see {running.instance.logs}")
        time.sleep(0.1)
    # The supervisor has added what it started.
    running.state = state
