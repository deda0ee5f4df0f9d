"""`beeline doctor`: whether this machine can serve a store, and the fix for each thing that is wrong."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from beeline.errors import BeelineError
from cli.console import Json, fail, result, say
from cli.serve import Config

if TYPE_CHECKING:
    from archive.mar import Archive
    from serve.up import Request

# By the exit code of an error.
_STATES = {1: "wrong", 2: "undetermined"}


def doctor(
    server: Annotated[
        str,
        typer.Option(help="The kind, as docs/operate.md names it; mms and triton are installed at their first use."),
    ] = "torchserve",
    store: Annotated[Path | None, typer.Option(help="Folder of archives. [default: model_store]")] = None,
    config: Config = None,
    goldens: Annotated[bool, typer.Option("--goldens", help="Verify each archive too, in some seconds each.")] = False,
    as_json: Json = False,
) -> None:
    """Check what `serve up` needs on this machine; exit 1 if something is wrong, 2 if it cannot be determined."""
    from serve.up import Request

    default = Request()
    request = Request(server, (), (store or default.store).resolve(), (config or default.config_file).resolve())
    rows = []
    for name, check in _checks(request, os.environ, goldens):
        try:
            rows.append({"name": name, "state": "ok", "text": check()})
        except (BeelineError, OSError) as error:
            rows.append({"name": name, "state": _STATES[getattr(error, "exit_code", 2)], "text": str(error)})
    result({"checks": rows}, as_json, "\n".join("{state:<13} {name:<10} {text}".format(**row) for row in rows))
    for code, state in _STATES.items():
        if any(row["state"] == state for row in rows):
            fail(code)


def _checks(request: Request, environ: Mapping[str, str], goldens: bool) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield each check: it returns what it saw, or raises the error that `serve up` would raise."""
    from archive import store, verify
    from host import files, machine
    from serve import config, instance, properties, servers, up
    from serve.gateway import nginx

    home, archives = instance.state_folder(environ), list[Any]()

    def folders() -> str:
        for path in (paths := (request.store, home, instance.short_path("").parent)):
            files.check_writable(path)
        return f"can be written: {', '.join(map(str, paths))}"

    def listing() -> str:
        trusted = properties.load(request.config_file, environ).texts.get("beeline_trusted_key", "")
        archives.extend(store.find_archives(request.store, trusted=trusted))
        for each in archives if goldens else ():
            verify.verify(each.path, "mms" if request.server == "mms" else "torchserve")
        names = ", ".join(f"{each.model} {each.version}" for each in archives)
        return f"{names}: {'golden pictures answered' if goldens else 'as they were built'}"

    def ports() -> str:
        if alive := [one.name for one in instance.known(home) if one.alive()]:
            return f"not checked, since {', '.join(alive)} is running"
        up.check_ports(request, environ)
        return "free"

    def memory() -> str:
        read, free = properties.load(request.config_file, environ), machine.free_memory()
        size = machine.cores(), len(machine.gpus()), free
        if warning := config.resolve(read, archives, request.overrides, environ, *size).warning:
            raise BeelineError(warning.removeprefix("warning: "))
        return f"{free // 10**6:,} MB free"

    yield "server", lambda: servers.named(request.server).prepare(say, environ).sentence
    yield "nginx", lambda: nginx.choose("auto", environ).sentence
    yield from {"processor": _processor, "pillow": _pillow, "folders": folders, "archives": listing}.items()
    yield from {"ports": ports, "memory": memory}.items()
    yield from ((each.__name__[1:], partial(each, archives)) for each in (_engines, _clock))
    yield "disk", lambda: _disk(archives, home)


def _processor() -> str:
    from beeline.settings import cgroups
    from bench.record import machine

    # In version 2 of cgroups, and in version 1.
    for controller, files in {"": ("cpu.max",), "cpu": ("cpu.cfs_quota_us", "cpu.cfs_period_us")}.items():
        for folder in cgroups(controller):
            # No such file, or no limit.
            with suppress(OSError, ValueError):
                limit, period = map(int, " ".join((folder / file).read_text() for file in files).split())
                if 0 < limit < period:
                    share = f"{limit / period:.2f} of a core"
                    raise BeelineError(f"{folder} allows {share}; allow one at least (cpu.max, --cpus)")
    values = machine()
    return f"{values['cpu']}, {values['cores']} of {os.cpu_count()} cores, {' '.join(values['features'])}"


def _pillow() -> str:
    names = {str(each.metadata["Name"]).lower() for each in metadata.distributions()}
    if {"pillow", "pillow-simd"} <= names:
        raise BeelineError(
            "Pillow and Pillow-SIMD share a folder, so neither is whole; run `make pillow` or `make simd`"
        )
    from beeline.formats import pillow_version

    return pillow_version()


def _engines(archives: Sequence[Archive]) -> str:
    from beeline.engines import runtime

    # One without a spec was not built by Beeline: TorchServe's own handlers need torch.
    packages = {runtime(each.engine or "torch"): each.path.name for each in archives}
    for package, file in packages.items():
        if util.find_spec(package) is None:
            raise BeelineError(f"{file} needs the package {package}, which is not installed; run `make setup`")
    return ", ".join(f"{package} {metadata.version(package)}" for package in packages) or "none is needed"


def _disk(archives: Sequence[Archive], folder: Path) -> str:
    free = shutil.disk_usage(next(each for each in (folder, *folder.parents) if each.exists())).free
    # The server copies and unpacks the archives; nginx lets in four large bodies at least (`serve.gateway.runtime`).
    needed = sum(each.unpacked + each.path.stat().st_size for each in archives) + 8 * 27_000_000
    if free < needed:
        sizes = f"{free // 10**6:,} MB free, and a start needs about {needed // 10**6:,} MB"
        raise BeelineError(f"{folder} has {sizes}; remove files, or set BEELINE_STATE to a folder on a larger disk")
    return f"{free // 10**6:,} MB free in {folder}"


def _clock(archives: Sequence[Archive]) -> str:
    now, built = time.time(), max((each.path.stat().st_mtime for each in archives), default=0.0)
    text = time.strftime("%F %T UTC", time.gmtime(now))
    if now < built - 60:
        raise BeelineError(f"the clock says {text}, and an archive was built {built - now:,.0f} s later; set the clock")
    return text
