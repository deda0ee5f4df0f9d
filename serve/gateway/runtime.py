"""The gateway's runtime folder: settings, page, error bodies, and nginx's configuration from `frontend/nginx`."""

from __future__ import annotations

import grp
import json
import os
import pwd
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

from beeline.errors import Undetermined
from host import ROOT
from host.files import write_whole
from serve.gateway.settings import Backend, Settings
from serve.ports import Address

PAGE = ROOT / "frontend"
_SHOWN = ("index.html", "style.css", "icon.svg", "scripts")
_CONFIGURATION = ("nginx.conf", "catalog.conf", "errors.conf", "hidden.conf", "management.conf", "security.conf")
# Bytes of the largest body that counts as middling in the configuration's maps.
_MIDDLING = 1_000_000
# What a backend's own gateway answers without its server: too many requests, a broken connection, not ready.
_OF_GATEWAYS = " http_429 http_502 http_503"
# The gateway's own errors, in the shape of the workers' errors: for each status a type and one sentence.
_ERRORS = {
    400: ("BadRequest", "the request is not valid HTTP/1.1; send it with a common client"),
    403: (
        "Forbidden",
        "management refuses requests from web pages and from other machines; ask it with curl on this machine (in "
        "containers, BEELINE_MANAGEMENT_FROM names further addresses)",
    ),
    404: ("NotFound", "nothing has this address; send a picture to /predictions/MODEL, /catalog.json lists the models"),
    405: ("MethodNotAllowed", "this address does not take that method; the Allow header names those that it takes"),
    408: ("RequestTimeout", "the request did not arrive in time; send it without pauses of ten seconds"),
    409: (
        "SeveralBackends",
        "several backends share the load, and this address cannot know which one is meant; change how many there are, "
        "or scale each one with `beeline serve scale` in its container",
    ),
    412: ("PreconditionFailed", "the request's condition does not hold; send it without If-Match"),
    413: ("TooManyBytes", "the request is larger than a picture of {max_image} bytes; send a smaller one"),
    414: ("UriTooLong", "the address is too long; /catalog.json lists the models"),
    416: ("NoSuchRange", "the file is shorter than that range; ask for all of it"),
    429: ("TooManyRequests", "the server holds as many requests as it can; try again after Retry-After seconds"),
    500: ("GatewayError", "the gateway failed; its log says why"),
    501: ("NotImplemented", "the request has a transfer encoding other than chunked; send it without one"),
    502: ("BadGateway", "the server broke the connection; try again"),
    503: ("NotReady", "the server is not ready; /ping says why, try again after Retry-After seconds"),
    504: ("DeadlineExceeded", "there was no answer within {deadline} seconds; try again when the server is less busy"),
    505: ("HttpVersion", "this version of HTTP is not supported; use HTTP/1.1"),
}
STATUSES = tuple(_ERRORS)
# The catalog of backends on other hosts; kept for a day after the last request, so that it outlives them.
_CATALOG_CACHE = (
    "proxy_cache_path temporary/catalog keys_zone=catalog:1m max_size=64m inactive=1d use_temp_path=off levels=1;"
)


def lay_out(settings: Settings, page: Path = PAGE) -> None:
    """Write everything that the gateway reads but the catalog, which `serve.gateway.catalog` writes afterwards.

    Whatever nginx's workers read must be readable by everybody: started by root, they run as nobody.

    Raises:
        Undetermined: when nginx refuses its configuration; the message quotes nginx.
    """
    settings.logs.mkdir(parents=True, exist_ok=True)
    settings.folder.mkdir()
    for name in ("web", "state/closed", "errors", "settings", "temporary"):
        (settings.folder / name).mkdir(parents=True)
    for name in _SHOWN:
        source = page / name
        if source.is_dir():
            shutil.copytree(source, settings.web / name, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(source, settings.web / name)
    for status, (kind, sentence) in _ERRORS.items():
        message = sentence.format(max_image=settings.max_image, deadline=settings.deadline)
        text = json.dumps({"code": status, "type": kind, "message": message})
        (settings.folder / "errors" / f"{status}.json").write_text(text, encoding="utf-8")
    write_state(settings, ready=False, text=json.dumps({"status": "Unhealthy", "reason": "starting", "models": {}}))
    open_to_all(settings.folder)
    settings.save()
    for name in _CONFIGURATION:
        shutil.copyfile(PAGE / "nginx" / name, settings.folder / name)
    for name, lines in _files(settings).items():
        _write(settings, name, lines)
    write_backends(settings, [backend.inference for backend in settings.backends], settings.backends)
    tried = subprocess.run(
        [*command(settings), "-t", "-q"],
        # A key with a passphrase must fail here, and not ask the terminal for it.
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode:
        raise Undetermined(f"nginx refuses its configuration: {tried.stderr.strip()}; see {settings.folder}")


def command(settings: Settings) -> list[str]:
    """Return the command line that runs nginx in the foreground."""
    folder = settings.folder
    return [settings.program, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(settings.error_log)]


def write_state(
    settings: Settings, ready: bool, text: str, draining: bool = False, closed: AbstractSet[str] = frozenset()
) -> None:
    """Write what `/ping` answers; at every moment one of the two files is there.

    Args:
        settings: the gateway's.
        ready: whether the answer is 200 or 503.
        text: the answer.
        draining: whether predictions that were let through still are.
        closed: the predictions to refuse while others are let through, as in `Seen`.
    """
    if ready:
        # First of all, so that a client that sees 200 is let through.
        _open(settings, closed)
    write_whole(settings.state / ("ready" if ready else "unready"), text + "\n", 0o644)
    if not ready:
        (settings.state / "ready").unlink(missing_ok=True)
        if closed:
            _open(settings, closed)
        elif not draining:
            (settings.state / "open").unlink(missing_ok=True)


def _open(settings: Settings, closed: AbstractSet[str]) -> None:
    """Let all predictions through but those of `closed`."""
    folder = settings.state / "closed"
    before = {path.name for path in folder.iterdir()}
    for name in closed - before:
        (folder / name).touch(0o644)
    (settings.state / "open").touch(0o644)
    for name in before - closed:
        (folder / name).unlink()


def open_to_all(folder: Path) -> None:
    """Let everybody read a folder and all below it, whatever the umask is."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def write_backends(settings: Settings, members: Sequence[str], known: Sequence[Backend]) -> None:
    """Write which backends share the load, and which one management is for; nginx reads it at its next reload.

    Only the prober decides which backends are in the group: nginx by itself would take a server out for ten seconds
    after one broken connection, and refuse everybody if that was the last one.
    """
    servers = [f"server {url.removeprefix('http://')} max_conns={settings.in_flight} max_fails=0;" for url in members]
    # A group must not be empty; nginx never connects to this address.
    none = ["server 127.0.0.1:1 down;"]
    lines = ["zone predictions 128k;", "least_conn;", *(servers or none), "keepalive 64;"]
    held = settings.in_flight * max(1, len(known))
    free = shutil.disk_usage(settings.folder).free
    of_address = [
        # This counts requests that still arrive too: one address may send twice as many as the servers hold.
        f"limit_conn address {2 * held};",
        f"limit_req zone=rate burst={2 * held} nodelay;",
    ]
    admission = [
        *of_address,
        # Large bodies that arrive may fill half of the free space, middling ones a quarter.
        *_places("large", free // 2 // settings.max_body),
        *_places("middling", free // 4 // _MIDDLING),
        # The access log has refusals and broken connections; here they would push out everything else.
        f"error_log {_quoted(settings.error_log)} crit;",
    ]
    # Where no server has room, nginx logs the group's name as the address; it does so too once it has tried them all.
    full = [f'"~^([^,]+, ){{0,{max(1, len(members)) - 1}}}predictions$" 1;', 'default "";']
    blocks = {"upstream predictions": lines, "map $upstream_addr $full": full}
    if settings.name:
        # Without a limit: the page gets its catalog however busy the backends are.
        blocks["upstream catalog"] = [f"server {url.removeprefix('http://')} max_fails=0;" for url in members] or none
    written = [line for name, block in blocks.items() for line in (f"{name} {{", *(f"    {one}" for one in block), "}")]
    _write(settings, "upstream.conf", written)
    _write(settings, "admission.conf", admission)
    # A catalog of backends on other hosts is proxied; any other is files.
    _write(settings, "catalog.conf", [*of_address, "include catalog.conf;"] if settings.name else [])
    _write(settings, "management.conf", _management(settings, known))


def _files(settings: Settings) -> dict[str, list[str]]:
    """Return the lines of each file of settings, by its name."""
    tls, deadline = settings.tls, settings.deadline
    again, connect, send = min(5000, 200 * deadline), min(2000, 100 * deadline), min(5000, 100 * deadline)
    listen = [f"listen {_at(address)} backlog=1024;" for address in settings.listen]
    if tls is not None:
        # Each form is refused or warned of by the other versions.
        has_directive = tuple(map(int, settings.version.split("."))) >= (1, 25, 1)
        listen += [
            f"listen {_at(tls.address)} ssl{'' if has_directive else ' http2'} backlog=1024;",
            *(["http2 on;"] if has_directive else []),
            f"ssl_certificate {_quoted(tls.certificate)};",
            f"ssl_certificate_key {_quoted(tls.key)};",
            "ssl_protocols TLSv1.2 TLSv1.3;",
            "ssl_session_cache shared:tls:2m;",
        ]
    return {
        "process.conf": [
            f"worker_processes {settings.processes};",
            f"error_log {_quoted(settings.error_log)} error;",
            # After a reload the old workers answer what they have; when the gateway stops it gives them less time.
            f"worker_shutdown_timeout {deadline + 5}s;",
            *_user(),
        ],
        "logs.conf": [f"access_log {_quoted(settings.access_log)} json buffer=64k flush=1s if=$logged;"],
        "zones.conf": [
            f"limit_req_zone $binary_remote_addr zone=rate:2m rate={settings.per_second}r/s;",
            *([_CATALOG_CACHE] if settings.name else []),
        ],
        "listen.conf": listen,
        "limits.conf": [
            f"client_max_body_size {settings.max_body};",
            # Their sum is the deadline: how late another try may begin, its connection, a pause while its body is
            # sent, its answer. A first try without an answer ends earlier, since no other may begin after it.
            f"proxy_next_upstream_timeout {again}ms;",
            f"proxy_connect_timeout {connect}ms;",
            f"proxy_send_timeout {send}ms;",
            f"proxy_read_timeout {1000 * deadline - again - connect - send}ms;",
        ],
        "retry.conf": [
            f"proxy_next_upstream error timeout non_idempotent{_OF_GATEWAYS if settings.name else ''};",
            "proxy_next_upstream_tries 3;",
        ],
    }


def _places(size: str, count: int) -> list[str]:
    """Return how many bodies of a size may lie in the temporary folder at once: of all addresses, and of each."""
    # nginx takes numbers up to 65535.
    places = min(65_535, max(4, count))
    return [f"limit_conn {size} {places};", f"limit_conn {size}_of {places // 2};"]


def _management(settings: Settings, known: Sequence[Backend]) -> list[str]:
    if settings.management is None:
        return []
    # With several backends the listener cannot know which one is meant.
    one = known[0].management if len(known) == 1 else ("several" if known else "none")
    return [
        "server {",
        f"    listen {_at(settings.management)};",
        *(f"    allow {address};" for address in settings.management_from),
        *(["    deny all;"] if settings.management_from else []),
        f"    set $management {one};",
        "    include management.conf;",
        "}",
    ]


def _write(settings: Settings, name: str, lines: Iterable[str]) -> None:
    write_whole(settings.folder / "settings" / name, "".join(f"{line}\n" for line in lines))


def _user() -> list[str]:
    """Return the user that nginx's workers run as, which is never root."""
    if os.geteuid() != 0:
        return []
    nobody = pwd.getpwnam("nobody")
    return [f"user nobody {grp.getgrgid(nobody.pw_gid).gr_name};"]


def _at(address: Address) -> str:
    """Return host and port as nginx takes them."""
    return str(address).partition("://")[2]


def _quoted(path: Path) -> str:
    text = str(path)
    if any(mark in text for mark in '"\\$\n'):
        raise Undetermined(f"the path {text!r} has a character with a meaning in nginx's configuration; rename it")
    return f'"{text}"'
