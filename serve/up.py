"""Start a server, wait until it really answers, keep it; everything ends with this process unless detached."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from beeline.errors import BeelineError, Undetermined
from serve import config, instance, java, kinds, logs, machine, ports, properties, server, store
from serve.client import InferenceClient, ManagementClient
from serve.instance import ROOT, Instance, State
from serve.ready import Watch, try_canary, wait_for_workers
from serve.running import Running
from serve.server import Places, Say, Server

# Java itself, before it loads a model; seconds.
_JAVA_PATIENCE = 60.0
_LOG_PATIENCE = 5.0


@dataclass(frozen=True)
class Request:
    """What to start. `wanted` names archives in the store or paths of `.mar` files; empty means all."""

    server: str = "torchserve"
    wanted: tuple[str, ...] = ()
    store: Path = ROOT / "model_store"
    config_file: Path = ROOT / "config" / "config.properties"
    name: str = instance.DEFAULT_NAME
    overrides: config.Overrides = field(default_factory=config.Overrides)


def up(request: Request, say: Say, environ: Mapping[str, str] = os.environ) -> Running:
    """Start a server and return when it is ready.

    Args:
        request: what to start.
        say: takes each line of progress.
        environ: where variables that win over the file are looked up, and what the server inherits.

    Raises:
        BeelineError: when what was asked for does not hold: an empty store, a taken port, a worker that
            refuses its archive; nothing is left running then.
        Undetermined: when Java or the server's package is missing, or nothing answers in time.
    """
    began = time.monotonic()
    kind = kinds.named(request.server)
    home = instance.state_folder(environ)
    target = instance.named(home, request.name)
    archives = _archives(kind, request)
    resolved = config.resolve(
        properties.load(request.config_file),
        archives,
        request.overrides,
        environ,
        machine.cores(),
        0 if environ.get("BEELINE_DEVICE") == "cpu" else machine.gpus(),
    )
    runtime = java.find(environ)
    python = kind.prepare(say)
    for name, stopped in instance.sweep_dead(home).items():
        say(f"stopped {len(stopped)} processes that the dead server {name!r} had left: {stopped}")
    lock = target.lock()
    if lock is None:
        raise BeelineError(
            f"a server named {request.name!r} is running; stop it with `beeline serve down`, or give another --name"
        )
    try:
        target.sweep()
        inference, management = ports.settle(
            [(resolved.inference, "--port"), (resolved.management, "--management-port")], kind.highest_port
        )
        resolved = config.with_addresses(resolved, inference, management)
        running = _spawn(target, lock, kind, resolved, archives, runtime, python, environ)
    finally:
        # The supervisor holds the same lock now, or nobody does.
        os.close(lock)
    try:
        say(f"{kind.title} starts on {inference}, management on {management}; Java {runtime.major} ({runtime.reason})")
        for line in resolved.lines():
            say(f"  {line}")
        _wait(running, kind, resolved, archives, say)
        running.ready()
    except BaseException:
        running.stop()
        raise
    running.seconds = time.monotonic() - began
    return running


def _archives(kind: Server, request: Request) -> tuple[store.Archive, ...]:
    archives = store.find(request.store, request.wanted)
    names = store.names(archives)
    if not kind.versions and len(names) < len(archives):
        raise BeelineError(
            f"{kind.title} serves one version of a model, the store holds {len(archives)} archives of "
            f"{len(names)} models; name one each with --model"
        )
    files = [archive.path.name for archive in archives]
    if len(set(files)) < len(files):
        raise BeelineError(f"two archives have the same file name ({', '.join(files)}); rename one")
    return archives


def _spawn(
    target: Instance,
    lock: int,
    kind: Server,
    resolved: config.Configuration,
    archives: tuple[store.Archive, ...],
    runtime: java.Java,
    python: Path,
    environ: Mapping[str, str],
) -> Running:
    """Write the state, lay out the files, start the supervisor with the lock and a pipe."""
    mark = target.new_mark()
    places = Places(instance.scratch(mark), target.logs)
    state = State(
        name=target.name,
        server=kind.name,
        mark=mark,
        inference=str(resolved.inference),
        management=str(resolved.management),
        temporary=str(places.temporary),
        command=server.command(kind, runtime, python, places, resolved.vmargs),
        environment=server.environment(kind, python, resolved, places),
        archives={archive.path.name: str(archive.path.resolve()) for archive in archives},
        configuration=resolved.to_dict(),
        started=time.time(),
    )
    target.clear()
    target.write(state)
    server.lay_out(kind, resolved, archives, places)
    read, write = os.pipe()
    try:
        with (target.logs / "supervisor.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "serve.supervisor", str(target.folder), str(lock), str(read)],
                env=server.clean(environ),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lock, read),
                # Out of reach of the terminal's Ctrl-C, which the command in the foreground hears.
                start_new_session=True,
            )
    finally:
        os.close(read)
    return Running(target, state, process, write)


def _wait(
    running: Running, kind: Server, resolved: config.Configuration, archives: tuple[store.Archive, ...], say: Say
) -> None:
    """Wait for Java, then for every model's workers and its canary."""
    with ManagementClient(running.state.management) as management:
        running.state = _java(running, management)
        assert running.state.java is not None
        watch = Watch(running.state.java, running.instance.logs)
        watch.workers()
        try:
            kind.register(management, resolved)
        except BeelineError as error:
            running.check()
            said = _reason(running.instance.logs)
            raise BeelineError(f"a model does not start: {said or error}; see `beeline serve logs`") from error
        with InferenceClient(running.state.inference) as inference:
            for model, archive in zip(resolved.models, archives, strict=True):
                version = model.version if kind.versions else None
                wanted = model.min_workers.value
                patience = model.startup_timeout.value
                wait_for_workers(management, model.model, version, wanted, watch, patience, running.check)
                say(f"{try_canary(inference, archive, version)}; workers: {wanted}")


def _reason(folder: Path) -> str | None:
    """Return the log's reason for a failed start; its last lines may be a moment behind the server's answer."""
    deadline = time.monotonic() + _LOG_PATIENCE
    while (said := logs.failure(folder)) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return said


def _java(running: Running, management: ManagementClient) -> State:
    """Return the state once it names Java and that answers."""
    deadline = time.monotonic() + _JAVA_PATIENCE
    while True:
        running.check()
        if running.process.poll() is not None:
            raise BeelineError(f"the server {running.instance.name!r} was stopped while it started")
        state = running.instance.read()
        if state is not None and state.java is not None and _answers(management):
            return state
        if time.monotonic() > deadline:
            raise Undetermined(f"Java does not answer after {_JAVA_PATIENCE:g} s; see {running.instance.logs}")
        time.sleep(0.1)


def _answers(management: ManagementClient) -> bool:
    try:
        management.list()
    except Undetermined:
        return False
    return True
