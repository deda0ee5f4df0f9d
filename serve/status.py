"""The servers that run on this machine: models, workers, processes, settings and counts of answers."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from pydantic import TypeAdapter

from archive.mar import MANIFEST
from beeline.errors import Undetermined
from beeline.metrics import FOLDER
from host import processes
from serve import counts, instance, servers
from serve.client import InferenceClient, ManagementClient, Model
from serve.config import Configuration, model_settings
from serve.instance import MARK, Instance, State


def status(home: Path, name: str | None = None) -> dict[str, Any]:
    """Return every running server, or the named one, as JSON values, and how the others ended.

    First stop what dead servers left; list these processes by name. Raise BeelineError if the named one does not run.
    """
    swept = instance.sweep_dead(home)
    known = [instance.running(home, name)[0]] if name is not None else instance.known(home)
    alive = [one for one in known if one.alive()]
    ends = {one.name: one.last_end() for one in known if one not in alive}
    return {
        "servers": [_server(one) for one in alive],
        "ended": [{"name": each, "reason": end[0], "failed": end[1]} for each, end in ends.items() if end],
        "swept": swept,
    }


def lines(report: dict[str, Any]) -> list[str]:
    """Return the result of `status` as lines for people."""
    out: list[str] = []
    for server in report["servers"]:
        out += _server_lines(server)
    for end in report["ended"]:
        out.append(f"{end['name']}: not running; {'failed: ' if end['failed'] else ''}{end['reason']}")
    for name, pids in report["swept"].items():
        out.append(f"{name}: stopped {len(pids)} processes that it left ({pids})")
    return out or ["no server is running; start one with `beeline serve up`"]


def _server(target: Instance) -> dict[str, Any]:
    state = target.read()
    if state is None:
        return {"name": target.name, "state": "starting or stopping"}
    models: list[dict[str, Any]] = []
    described: list[Model | None] = []
    note = None
    kind, started = servers.named(state.server), [model_settings(each) for each in state.configuration["models"]]
    with ManagementClient(state.management, timeout=5) as management:
        try:
            described = [management.describe(kind.path(each)) for each in started]
            models = [{**asdict(model), "ready": model.ready} for model in described if model is not None]
        except Undetermined as error:
            note = str(error)
    failed = instance.failures(target.failed)
    for each, now in zip(started, described, strict=False):
        if now is not None and now.ready:
            # It was scaled up since.
            failed.pop(f"{each.model}/{each.version}", None)
    return {
        "name": state.name,
        "state": _readiness(state),
        "server": state.server,
        "url": state.inference,
        "gateway": state.gateway_kind,
        "gateway_program": state.gateway_program,
        "addresses": state.addresses,
        "management": state.addresses.get("management") or state.management,
        "seconds": round(time.time() - state.started, 1),
        "models": models,
        "failed": failed,
        "note": note,
        "archives": state.archives,
        "processes": _processes(state),
        "answers": counts.answers(Path(state.environment[FOLDER])) or {} if FOLDER in state.environment else {},
        "configuration": state.configuration,
        "logs": str(target.logs),
    }


def _readiness(state: State) -> str:
    """Return the state; a gateway knows it best."""
    if not state.ready or not state.gateway:
        return "ready" if state.ready else "starting"
    with InferenceClient(state.inference, timeout=5, patience=0) as client:
        reason = client.unready()
    return "ready" if reason is None else f"not ready ({reason})"


def _processes(state: State) -> list[dict[str, Any]]:
    """Return id, kind and resident megabytes of the supervisor and of every marked process."""
    kinds = {state.supervisor: "supervisor", state.server_process: "server", state.gateway_process: "gateway"}
    marked = processes.marked(MARK, state.mark, Path(state.temporary))
    out = []
    for pid in (*([state.supervisor] if state.supervisor else []), *(process.pid for process in marked)):
        # It may have ended meanwhile.
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            # nginx by its title, since its program may have any name; a worker runs in the folder of its archive.
            words = " ".join(process.cmdline())
            if words.startswith("nginx: "):
                other = "nginx"
            elif "gateway.adapter" in words:
                other = "adapter"
            else:
                other = "worker" if (Path(process.cwd()) / MANIFEST).is_file() else "other"
            megabytes = round(process.memory_info().rss / 1e6, 1)
            out.append({"pid": process.pid, "kind": kinds.get(pid, other), "megabytes": megabytes})
    return out


def _server_lines(server: dict[str, Any]) -> list[str]:
    if "server" not in server:
        return [f"{server['name']}: {server['state']}"]
    out = [
        f"{server['name']}: {server['server']}, {server['state']} since {server['seconds']:.0f} s, "
        f"{server['url']}, management {server['management']}"
    ]
    addresses = [(name, server["addresses"][name]) for name in ("page", "tls", "metrics", "backend")]
    shown = ", ".join(f"{name} {address}" for name, address in addresses if address is not None)
    out.append(f"  gateway: {server['gateway_program'] or server['gateway']}; {shown}")
    if server["note"]:
        out.append(f"  {server['note']}")
    for model in server["models"]:
        out.append(
            f"  {model['name']} {model['version']}: {model['ready']} of {len(model['workers'])} workers ready "
            f"({model['min_workers']} to {model['max_workers']}), batch {model['batch_size']}, "
            f"delay {model['max_batch_delay']} ms"
        )
    out += [f"  {name} is not served: {reason}" for name, reason in server["failed"].items()]
    for process in server["processes"]:
        out.append(f"  {process['kind']} {process['pid']}: {process['megabytes']:.0f} MB")
    for model_name, by_status in server["answers"].items():
        out.append(f"  answers of {model_name}: " + ", ".join(f"{count} x {code}" for code, count in by_status.items()))
    out += [f"  {line}" for line in TypeAdapter(Configuration).validate_python(server["configuration"]).lines()]
    out.append(f"  logs: {server['logs']}")
    return out
