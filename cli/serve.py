"""`beeline serve`: start, watch, scale and stop TorchServe or Multi Model Server on this machine."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from beeline.errors import ConfigError
from cli.console import Json, out, result, say

app = typer.Typer(help="Start, watch, scale and stop servers.", no_args_is_help=True, add_completion=False)

Name = Annotated[str | None, typer.Option("--name", help="Which server, where several run.")]
ShowLogs = Annotated[str | None, typer.Option(help="Logs to print as they grow: 'all', or names with commas.")]
Nginx = Annotated[Path | None, typer.Option(help="nginx. [default: BEELINE_NGINX, the system's, the set-up's]")]
Config = Annotated[Path | None, typer.Option(help="Limits and addresses. [default: config/config.properties]")]


@app.command()
def up(
    server: Annotated[str, typer.Option(help="The kind of server, as docs/operate.md names it.")] = "torchserve",
    model: Annotated[list[str] | None, typer.Option(help="Archive in the store; repeat it. [default: all]")] = None,
    mar: Annotated[list[Path] | None, typer.Option(help="A .mar file anywhere; repeat it.")] = None,
    store: Annotated[Path | None, typer.Option(help="Folder of archives. [default: model_store]")] = None,
    config: Config = None,
    name: Annotated[str, typer.Option(help="The server's name.")] = "default",
    gateway: Annotated[str, typer.Option(help="auto (which is nginx), nginx or none.")] = "auto",
    nginx: Nginx = None,
    port: Annotated[int | None, typer.Option(help="Port for predictions; 0 for free ones everywhere.")] = None,
    page_port: Annotated[int | None, typer.Option(help="A second port for page and API.")] = None,
    management_port: Annotated[int | None, typer.Option(help="Port for management; 0 for a free one.")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Port for metrics; 0 for a free one.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Requests a forward pass takes at most.")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes of each model.")] = None,
    max_batch_delay: Annotated[int | None, typer.Option(help="Milliseconds a batch waits to fill.")] = None,
    listed: Annotated[bool, typer.Option("--listed", help="Serve only archives that the store's index lists.")] = False,
    sagemaker: Annotated[
        Path | None, typer.Option(help="Keep SageMaker's contract for its folder of the model, /opt/ml/model there.")
    ] = None,
    show_logs: ShowLogs = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return when ready and leave it running.")] = False,
    as_json: Json = False,
) -> None:
    """Start a server and wait until it answers; Ctrl-C stops everything it started."""
    from archive.inspect import card
    from host import signals
    from serve import up as room
    from serve.addresses import Ports
    from serve.config import Overrides
    from serve.instance import named, state_folder
    from serve.instance.child import greeting, summary

    defaults = room.Request()
    request = room.Request(
        server=server,
        wanted=(*(model or ()), *(str(path.resolve()) for path in mar or ())),
        store=(store or defaults.store).resolve(),
        config_file=(config or defaults.config_file).resolve(),
        name=name,
        overrides=Overrides(batch_size, workers, max_batch_delay),
        ports=Ports(port, management_port, page_port, metrics_port),
        gateway=gateway,
        card=lambda mar: card(mar).to_dict(),
        listed=listed,
    )
    environ = _environ(nginx)
    if sagemaker is not None:
        from serve.sagemaker import contract

        request, environ = contract(request, sagemaker, environ, say)
    if show_logs is not None:
        _show(named(state_folder(os.environ), name).logs, show_logs)
    with signals.as_exceptions():
        try:
            running = room.up(request, say, environ)
        except signals.Interrupted as interruption:
            say(f"stopped while starting ({interruption})")
            raise typer.Exit(interruption.exit_code) from interruption
        with running:
            try:
                result(summary(running), as_json, "\n".join(greeting(running)))
                _tell_systemd()
                if detach:
                    running.detach()
                    return
                say("Ctrl-C stops it.")
                running.wait()
                say("stopped by `beeline serve down`")
            except signals.Interrupted as interruption:
                say(f"stopping ({interruption}) ...")
                running.stop()
                say("stopped")


@app.command()
def gateway(
    names: Annotated[list[str] | None, typer.Argument(help="Servers that run, by the --name of their start.")] = None,
    backends: Annotated[
        str | None,
        typer.Option(help="Instead of names: http://NAME:PORT of backends on other hosts.", envvar="BEELINE_BACKENDS"),
    ] = None,
    config: Config = None,
    nginx: Nginx = None,
    port: Annotated[int | None, typer.Option(help="Port for page and API; 0 for a free one.")] = None,
    page_port: Annotated[int | None, typer.Option(help="A second port for page and API.")] = None,
    show_logs: ShowLogs = None,
) -> None:
    """Balance the load of several running servers; a server that is not ready gets no requests."""
    from serve import up as room
    from serve.addresses import Ports
    from serve.gateway.backends import discover, logs, share
    from serve.instance import state_folder

    file, ports = (config or room.Request().config_file).resolve(), Ports(port, page=page_port)
    if bool(names) == bool(backends):
        raise ConfigError("name either servers of this machine, as in `beeline serve gateway one two`, or --backends")
    if backends:
        if show_logs is not None:
            _show(logs(state_folder(os.environ)), show_logs)
        discover(backends, file, ports, say, _environ(nginx))
        return
    if show_logs is not None:
        raise ConfigError("--show-logs goes with --backends; servers of this machine have `beeline serve logs`")
    # It is not in the gateway's image.
    from archive.inspect import card

    share(names or [], file, ports, say, lambda mar: card(mar).to_dict(), _environ(nginx))


@app.command()
def down(
    name: Name = None,
    every: Annotated[bool, typer.Option("--all", help="Every server of this repository.")] = False,
    as_json: Json = False,
) -> None:
    """Stop a server and everything that it started; clean up after a killed one."""
    from serve import instance

    stopped = instance.down(instance.state_folder(os.environ), name, every)
    lines = [
        f"{each}: " + (f"stopped {len(left)} processes of a dead server" if left else "stopped")
        for each, left in stopped.items()
    ]
    values = {"stopped": [{"name": each, "leftovers": left} for each, left in stopped.items()]}
    result(values, as_json, "\n".join(lines) or "nothing was running")


@app.command()
def status(name: Name = None, as_json: Json = False) -> None:
    """Show running servers: workers, processes, settings with their reasons, numbers of answers."""
    from serve.instance import state_folder
    from serve.status import lines, status

    report = status(state_folder(os.environ), name)
    result(report, as_json, "\n".join(lines(report)))


@app.command()
def scale(
    model: Annotated[str, typer.Argument(help="The model's name, or NAME/VERSION.")],
    low: Annotated[int, typer.Option("--min", help="Workers to run.")],
    high: Annotated[int | None, typer.Option("--max", help="Workers at most. [default: --min]")] = None,
    name: Name = None,
    as_json: Json = False,
) -> None:
    """Change a model's number of workers and wait until they are ready; revive a model that has none."""
    from serve.instance import running, state_folder
    from serve.scale import scale as change

    done = change(*running(state_folder(os.environ), name), model, low, low if high is None else high, say)
    healed = " after healing" if done.healed else ""
    text = f"{done.model}: {done.workers} workers ready{healed} in {done.seconds:.1f} s; {done.golden}"
    result(asdict(done), as_json, text)


@app.command()
def logs(
    name: Name = None,
    file: Annotated[
        str | None, typer.Option(help="worker, server, console, supervisor, gateway or access. [default: all]")
    ] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", help="How many of each.")] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print new lines as they are added.")] = False,
    as_json: Json = False,
) -> None:
    """Show a server's logs: the running one's, or the last one's."""
    from serve.instance import logs as room
    from serve.instance import state_folder, to_read

    files = room.paths(to_read(state_folder(os.environ), name).logs, file)
    shown = {path.name: room.tail(path, lines) for path in files}
    text = "\n".join(line for path, tail in shown.items() for line in (f"==> {path} <==", *tail))
    if not follow:
        result({"logs": shown}, as_json, text)
        return
    out.print(text, markup=False)
    try:
        for path, line in room.follow(files):
            out.print(f"{path.stem}: {line}", markup=False)
    except KeyboardInterrupt:
        return


def _environ(nginx: Path | None) -> dict[str, str]:
    """Return the environment with the nginx of the option `--nginx`."""
    return {**os.environ, **({"BEELINE_NGINX": str(nginx)} if nginx is not None else {})}


def _tell_systemd() -> None:
    """Say that the server answers, where systemd waits for that: sd_notify(3)."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(b"READY=1", address.replace("@", "\0", 1))


def _show(folder: Path, names: str) -> None:
    """Print logs to stdout as they grow, without formatting, for the container engine."""
    from serve.instance import logs as room

    def write(line: str) -> None:
        sys.stdout.write(line)
        sys.stdout.flush()

    room.show(folder, room.NAMES if names == "all" else [name.strip() for name in names.split(",")], write)
